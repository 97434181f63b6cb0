"""LoRTA directories in the layout of the reference implementation (github.com/ihounie/lorta), against a literal reconstruction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.formats.errors import AdaptError

D, D_H, HEADS, LAYERS, RANK = 32, 8, 4, 2, 3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIG = {"peft_type": "LORTA", "r": RANK, "lora_alpha": 6, "target_modules": MODULES}
P = "base_model.model."


@pytest.fixture(scope="module")
def square(make_pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama whose q, k, v and o are all square: the only kind that the reference can adapt."""
    return make_pair(tmp_path_factory.mktemp("square"), "llama", num_key_value_heads=HEADS)


def factors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shapes = {"A": (D, RANK), "B": (RANK, D_H), "C_h": (HEADS, RANK), "C_l": (LAYERS, RANK), "C_m": (4, RANK)}
    return {f"{P}lora_{name}": torch.randn(shape) for name, shape in shapes.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def reference_delta(tensors: dict[str, torch.Tensor], scale: float, layer: int, matrix: int) -> torch.Tensor:
    """As the reference builds it, head by head: `A diag(C_h[h] C_m[m] C_l[l]) B` side by side."""
    f = {name.removeprefix(f"{P}lora_"): value.double() for name, value in tensors.items()}
    heads = [f["A"] @ torch.diag(f["C_h"][h] * f["C_m"][matrix] * f["C_l"][layer]) @ f["B"] for h in range(len(f["C_h"]))]
    return scale * torch.cat(heads, dim=1)


def expected_logits(square, tensors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    model = square.load(square.base)
    for layer in range(LAYERS):
        for number, module in enumerate(MODULES):
            weight = model.get_parameter(f"model.layers.{layer}.self_attn.{module}.weight")
            weight.data += reference_delta(tensors, scale, layer, number).float()
    return square.logits(model)


SCALES: dict[str, tuple[dict[str, Any], float]] = {
    "alpha / r": ({}, 6 / RANK),
    "rsLoRA": ({"use_rslora": True}, 6 / math.sqrt(RANK)),
    "as peft names it": ({"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x"}, 6 / RANK),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_reference_layout_is_read_by_every_road(square, tmp_path: Path, case: str) -> None:
    changes, scale = SCALES[case]
    tensors = factors()
    adapter = write(tmp_path / "adapter", tensors, CONFIG | changes)
    expected = expected_logits(square, tensors, scale)
    assert (expected - square.logits(square.load(square.base))).abs().max() > 1e-2
    loaded = square.logits(adapt_convert.load(square.load(square.base), adapter))
    torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=1e-4)
    out = adapt_convert.convert(square.base, adapter, to="lora", rank=HEADS * RANK).save(tmp_path / "lora")
    torch.testing.assert_close(square.logits(square.load_peft(out)), expected, atol=1e-4, rtol=1e-4)
    written = load_file(out / "adapter_model.safetensors")
    for layer in range(LAYERS):
        for number, module in enumerate(MODULES):
            key = f"{P}model.layers.{layer}.self_attn.{module}.lora_"
            product = written[f"{key}B.weight"] @ written[f"{key}A.weight"]
            torch.testing.assert_close(product.double(), reference_delta(tensors, scale, layer, number), atol=1e-4, rtol=1e-4)
    adapt_convert.merge(square.base, adapter, tmp_path / "merged")
    torch.testing.assert_close(square.logits(square.load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", ""])
def test_prefixes_of_the_keys(square, tmp_path: Path, prefix: str) -> None:
    tensors = factors()
    adapter = write(tmp_path / "a", {name.replace(P, prefix): value for name, value in tensors.items()}, CONFIG)
    loaded = square.logits(adapt_convert.load(square.load(square.base), adapter))
    torch.testing.assert_close(loaded, expected_logits(square, tensors, 2.0), atol=1e-4, rtol=1e-4)


def test_what_we_write_is_the_reference_layout(square, tmp_path: Path) -> None:
    conversion = adapt_convert.convert(square.base, square.ft, to="lorta", rank=RANK, orientation="reference")
    out = conversion.save(tmp_path / "out")
    written = {n: t for n, t in load_file(out / "adapter_model.safetensors").items() if ".lora_" in n}
    assert {name: tuple(value.shape) for name, value in written.items()} == {n: tuple(t.shape) for n, t in factors().items()}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORTA"
    assert config["lora_alpha"] == config["r"] == RANK
    assert config["use_rslora"] is False
    assert sorted(config["target_modules"]) == sorted(MODULES)
    # Read as the reference reads it - without what we add to the config - it is the same adapter.
    bare = write(tmp_path / "bare", written, {key: config[key] for key in CONFIG})
    base, ft = load_file(square.base / "model.safetensors"), load_file(square.ft / "model.safetensors")
    missed = total = 0.0
    for layer in range(LAYERS):
        for number, module in enumerate(MODULES):
            name = f"model.layers.{layer}.self_attn.{module}.weight"
            change = (ft[name] - base[name]).double()
            missed += float((change - reference_delta(written, 1.0, layer, number)).square().sum())
            total += float(change.square().sum())
    assert conversion.report["captured_energy"] == pytest.approx(1 - missed / total, rel=1e-4)
    loaded = square.logits(adapt_convert.load(square.load(square.base), bare))
    torch.testing.assert_close(loaded, expected_logits(square, written, 1.0), atol=1e-4, rtol=1e-4)


def shaped(name: str, *shape: int) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({f"{P}lora_{name}": torch.ones(shape)})


def described(*row: Any, group: Any = (0, 0, 0, 0)) -> dict[str, Any]:
    return {"blocks": {"attention": {"group": group, "slots": [list(row)]}}}


Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "A missing": ({}, lambda t: t.pop(f"{P}lora_A"), "lora_A is missing"),
    "C_h missing": ({}, lambda t: t.pop(f"{P}lora_C_h"), "lora_C_h is missing"),
    "ranks differ": ({}, shaped("C_l", LAYERS, RANK + 1), "C_l has rank 4, A has 3"),
    "B transposed": ({}, shaped("B", D_H, RANK), "B has rank"),
    "a vector": ({}, shaped("A", D), "expected a matrix"),
    "rank 0": ({}, lambda t: [t.update({n: v.new_ones(v.T[:0].T.shape if "B" not in n else (0, D_H))}) for n, v in t.items()], "rank 0"),
    "too few layers": ({}, shaped("C_l", 1, RANK), "outside the tensor"),
    "too few matrices": ({}, shaped("C_m", 3, RANK), "group"),
    "another width": ({}, shaped("A", D + 1, RANK), r"\[33, 32\] .* but \[32, 32\]"),
    "integers": ({}, lambda t: t.update({f"{P}lora_A": torch.ones(D, RANK).int()}), "lora_A is stored as I32"),
    "alpha text": ({"lora_alpha": "much"}, dict, "lora_alpha"),
    "alpha NaN": ({"lora_alpha": math.nan}, dict, "lora_alpha"),
    "alpha null": ({"lora_alpha": None}, dict, "lora_alpha"),
    "blocks a list": ({"blocks": [1]}, dict, "blocks"),
    "block of another name": ({"blocks": {"vision": {"group": [0], "slots": []}}}, dict, "vision"),
    "block null": ({"blocks": {"attention": None}}, dict, "attention"),
    "group text": (described(Q, 0, 0, False, None, None, group="0000"), dict, "attention"),
    "group outside": (described(Q, 0, 0, False, None, None, group=[0, 0, 0, 7]), dict, "group"),
    "group negative": (described(Q, 0, 0, False, None, None, group=[0, 0, 0, -1]), dict, "group"),
    "slots a number": ({"blocks": {"attention": {"group": [0, 0, 0, 0], "slots": 3}}}, dict, "attention"),
    "slot too short": (described(Q, 0, 0), dict, "attention"),
    "slot of a number": (described(7, 0, 0, False, None, None), dict, "malformed slot"),
    "layer true": (described(Q, True, 0, False, None, None), dict, "malformed slot"),
    "layer outside": (described(Q, 5, 0, False, None, None), dict, "outside the tensor"),
    "layer negative": (described(Q, -1, 0, False, None, None), dict, "malformed slot"),
    "start text": (described(Q, 0, 0, False, "0", "32"), dict, "malformed slot"),
    "start alone": (described(Q, 0, 0, False, 0, None), dict, "malformed slot"),
    "rows reversed": (described(Q, 0, 0, False, 32, 0), dict, "malformed slot"),
    "rows far away": (described(Q, 0, 0, True, 0, 10**12), dict, "rows"),
    "stride short": (described(Q, 0, 0, True, 0, 8, 4), dict, "malformed slot"),
    "stride without rows": (described(Q, 0, 0, True, None, None, 24), dict, "malformed slot"),
    "stride uneven": (described(Q, 0, 0, True, 0, 5, 24), dict, "rows"),
    "stride far": (described(Q, 0, 0, True, 0, 8, 10**12), dict, "not a fine-tune of this base"),
    "transposed text": (described(Q, 0, 0, "no", None, None), dict, "malformed slot"),
    "module of another base": (described("model.layers.7.self_attn.q_proj", 0, 0, False, None, None), dict, "does not have"),
    "NaN": ({}, lambda t: t[f"{P}lora_A"].fill_(math.nan), "not finite"),
    "empty": ({}, dict.clear, "lora_A is missing|no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(square, tmp_path: Path, case: str) -> None:
    changes, change, message = BROKEN[case]
    tensors = factors()
    change(tensors)
    adapter = write(tmp_path / "adapter", tensors, CONFIG | changes)
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(square.base, adapter, to="lora", rank=2)
    model = square.load(square.base)
    before = square.logits(model)
    if case != "NaN":
        with pytest.raises(AdaptError):
            adapt_convert.load(model, adapter)
        assert torch.equal(square.logits(model), before)


def test_grouped_query_attention_is_refused(pairs, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", factors(), CONFIG)
    pair = pairs("llama")  # k and v have half the heads
    with pytest.raises(AdaptError, match=r"k_proj.weight is \[32, 32\] .* but \[16, 32\]"):
        adapt_convert.convert(pair.base, adapter, to="lora", rank=2)
    with pytest.raises(AdaptError, match="k_proj"):
        adapt_convert.load(pair.load(pair.base), adapter)
