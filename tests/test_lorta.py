"""LoRTA from checkpoint to checkpoint: planted tensors, grouped-query attention, the MLP block, and exact ways back to LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tensorly
import torch
from safetensors.torch import load_file

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.delta import LowRankDelta

PREFIX = "base_model.model."
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")


def planted(rank: int, heads: dict[str, int], layers: int = 2, d: int = 32, d_h: int = 8) -> dict[str, torch.Tensor]:
    """Deltas of one CP tensor, formed entry by entry with einsum from the paper's definition."""
    draw = torch.Generator().manual_seed(3)
    a, b, c_l, c_m = (torch.randn(n, rank, generator=draw, dtype=torch.float64) for n in (d, d_h, layers, 4))
    by_count = {n: torch.randn(n, rank, generator=draw, dtype=torch.float64) for n in set(heads.values())}
    deltas = {}
    for layer in range(layers):
        for m, role in enumerate(ROLES):
            tensor = torch.einsum("ar,jr,hr,r,r->ahj", a, b, by_count[heads[role]], c_l[layer], c_m[m])
            matrix = tensor.reshape(d, -1)  # (residual, heads * d_h)
            deltas[f"model.layers.{layer}.self_attn.{role}.weight"] = matrix if role == "o_proj" else matrix.T
    return deltas


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_planted_tensor_is_recovered(make_pair: Any, tmp_path: Path, kv_heads: int) -> None:
    heads = {"q_proj": 4, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": 4}
    deltas = planted(4, heads)

    def change(model: Any) -> None:
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta.float())

    pair = make_pair(tmp_path, "llama", change, num_key_value_heads=kv_heads)
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=4).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    assert 1 - report["captured_energy"] < 1e-10  # 1e-5 of the norm
    assert sum(row["status"] == "factored" for row in report["tensors"].values()) == 8
    model = adapt_convert.load(pair.load(pair.base), out)
    torch.testing.assert_close(pair.logits(model), pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-3)


def test_the_file_is_the_papers_tensor(make_pair: Any, tmp_path: Path) -> None:
    """The written factors, put together by tensorly, are the planted 5-way tensor `d x d_h x H x L x M`."""
    deltas = planted(3, dict.fromkeys(ROLES, 4))

    def change(model: Any) -> None:
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta.float())

    pair = make_pair(tmp_path, "llama", change, num_key_value_heads=4)
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=3).save(tmp_path / "out")
    f = {key.removeprefix(PREFIX): value.double() for key, value in load_file(out / "adapter_model.safetensors").items()}
    assert sorted(f) == ["lora_A", "lora_B", "lora_C_h", "lora_C_l", "lora_C_m"]
    modes = [f["lora_A"], f["lora_B"].T, f["lora_C_h"], f["lora_C_l"], f["lora_C_m"]]
    full = torch.from_numpy(tensorly.cp_to_tensor((None, [mode.numpy() for mode in modes])))
    for m, role in enumerate(ROLES):
        for layer in range(2):
            matrix = full[:, :, :, layer, m].transpose(1, 2).reshape(32, 32)  # (d, H d_h)
            expected = deltas[f"model.layers.{layer}.self_attn.{role}.weight"]
            torch.testing.assert_close(matrix if role == "o_proj" else matrix.T, expected, atol=1e-4, rtol=1e-4)
    numbers = sum(value.numel() for value in f.values())
    assert numbers == (32 + 8 + 4 + 2 + 4) * 3


def test_the_mlp_is_a_tensor_of_its_own(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=3, target_modules=("all-linear",)).save(tmp_path / "out")
    names = {key.removeprefix(PREFIX) for key in load_file(out / "adapter_model.safetensors")}
    assert {"lora_mlp_A", "lora_mlp_B", "lora_mlp_C_l", "lora_mlp_C_m", "lora_C_hkv"} <= names
    rows = json.loads((out / "conversion.json").read_text())["tensors"]
    assert rows["model.layers.1.mlp.down_proj.weight"]["status"] == "factored"


def test_reported_energy_is_that_of_the_written_file(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=5, dtype="bfloat16").save(tmp_path / "out")
    lora = adapt_convert.convert(pair.base, out, rank=64, dtype="float32").save(tmp_path / "lora")
    base, ft = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    written, rows = load_file(lora / "adapter_model.safetensors"), json.loads((out / "conversion.json").read_text())["tensors"]
    for name, row in rows.items():
        if row["status"] == "factored":
            b, a = (written[f"{PREFIX}{name.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "BA")
            delta = (ft[name] - base[name]).double()
            captured = 1 - float((delta - b @ a).square().sum() / delta.square().sum())
            assert row["captured_energy"] == pytest.approx(captured, abs=1e-5)


def test_lorta_to_lora_and_back_forms_no_product(make_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = planted(4, {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4})

    def change(model: Any) -> None:
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta.float())

    pair = make_pair(tmp_path, "llama", change)
    first = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=4).save(tmp_path / "lorta")
    monkeypatch.setattr(LowRankDelta, "dense", lambda self: pytest.fail("a product was formed"))
    lora = adapt_convert.convert(pair.base, first, rank=4).save(tmp_path / "lora")
    assert json.loads((lora / "conversion.json").read_text())["captured_energy"] == pytest.approx(1, abs=1e-9)
    monkeypatch.undo()
    again = adapt_convert.convert(pair.base, lora, to="lorta", rank=4).save(tmp_path / "again")
    assert json.loads((again / "conversion.json").read_text())["captured_energy"] == pytest.approx(1, abs=1e-9)


def test_refusals(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match="--orientation paper"):  # k and v are not square under grouped-query attention
        adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2, orientation="reference")
    with pytest.raises(AdaptError, match="give --rank"):
        adapt_convert.convert(pair.base, pair.ft, to="lorta", energy=0.5)
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2).save(tmp_path / "out")
    model = adapt_convert.load(pair.load(pair.base), out)
    with pytest.raises(AdaptError, match="carries an adapter"):
        adapt_convert.load(model, out)
    other = pairs("gpt2")
    stranger = other.load(other.base)
    before = other.logits(stranger)
    with pytest.raises(AdaptError, match="does not have"):
        adapt_convert.load(stranger, out)
    assert torch.equal(other.logits(stranger), before)
    with pytest.raises(AdaptError, match="no adapter"):
        adapt_convert.unload(stranger)


def test_factors_that_cancel_are_stored_in_float32(make_pair: Any, tmp_path: Path) -> None:
    """The best fit of rank 2 to a tensor of border rank 2 and rank 3 has columns that grow without bound and cancel (Kolda and Bader 2009,
    section 3.3): bfloat16 loses it."""
    draw = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 32, generator=draw), torch.randn(2, 8, generator=draw)
    sides = (torch.outer(a[0], b[1]) + torch.outer(a[1], b[0]), torch.outer(a[0], b[0]))

    def change(model: Any) -> None:
        model.to(torch.bfloat16)
        for layer, side in enumerate(sides):
            for role in ("q_proj", "k_proj", "v_proj"):
                weight = model.get_parameter(f"model.layers.{layer}.self_attn.{role}.weight")
                weight.add_(side.repeat(1, weight.shape[0] // 8).T.to(weight.dtype))

    pair = make_pair(tmp_path, "llama", change)
    report, dtypes = {}, {}
    for dtype in (None, "bfloat16"):
        out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2, dtype=dtype).save(tmp_path / str(dtype))
        report[dtype] = json.loads((out / "conversion.json").read_text())["captured_energy"]
        dtypes[dtype] = load_file(out / "adapter_model.safetensors")[PREFIX + "lora_A"].dtype
    assert dtypes == {None: torch.float32, "bfloat16": torch.bfloat16}
    assert report[None] > report["bfloat16"] + 0.01
