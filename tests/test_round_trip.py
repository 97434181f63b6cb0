"""Base plus written adapter, loaded by the adapter's own library, against weights computed by `torch.linalg.svd`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

import adapt_convert
from adapt_convert.cli import main

ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit", "t5"]


def svd_truncated(base: torch.Tensor, ft: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd((ft - base).double(), full_matrices=False)
    return base + (u[:, :rank] * s[:rank] @ vt[:rank]).float()


def expected_logits(pair, report: dict, rank: int) -> torch.Tensor:
    """Logits of the base with every factored matrix moved by its truncated SVD and everything else as in the fine-tune."""
    base, ft = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    model = pair.load(pair.ft)
    factored = {key for row in report["tensors"].values() if row["status"] == "factored" for key in row["source_tensors"]}
    state = {name: svd_truncated(base[name], value, rank) if name in factored else value for name, value in ft.items()}
    model.save_pretrained(pair.base.parent / "expected", state_dict=model.state_dict())
    from safetensors.torch import save_file

    save_file(state, pair.base.parent / "expected" / "model.safetensors", metadata={"format": "pt"})
    return pair.logits(pair.load(pair.base.parent / "expected"))


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_through_peft(pairs, tmp_path: Path, name: str, rank: int) -> None:
    pair = pairs(name)
    conversion = adapt_convert.convert(pair.base, pair.ft, to="lora", rank=rank)
    out = conversion.save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    assert "dropped" not in {row["status"] for row in report["tensors"].values()}
    got = pair.logits(pair.load_peft(out))
    torch.testing.assert_close(got, expected_logits(pair, report, rank), atol=2e-4, rtol=1e-4)
    if rank == 64:  # above every dimension: clamped, and exact
        torch.testing.assert_close(got, pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-4)
        assert report["captured_energy"] > 1 - 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lorta_through_adapt_convert(pairs, tmp_path: Path, name: str) -> None:
    pair = pairs(name)
    lorta = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=6, target_modules=("all-linear",)).save(tmp_path / "lorta")
    base = pair.load(pair.base)
    before = pair.logits(base)
    attached = pair.logits(adapt_convert.load(base, lorta))
    # The same adapter by another road: as an exact LoRA through peft.
    lora = adapt_convert.convert(pair.base, lorta, to="lora", rank=64).save(tmp_path / "lora")
    torch.testing.assert_close(attached, pair.logits(pair.load_peft(lora)), atol=2e-4, rtol=1e-4)
    assert (attached - before).abs().max() > 1e-2
    assert torch.equal(pair.logits(adapt_convert.unload(base)), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("target", ["lora", "lorta"])
def test_merge_equals_the_loaded_adapter(pairs, tmp_path: Path, name: str, target: str) -> None:
    pair = pairs(name)
    adapter = adapt_convert.convert(pair.base, pair.ft, to=target, rank=4).save(tmp_path / "adapter")
    adapt_convert.merge(pair.base, adapter, tmp_path / "merged")
    loaded = pair.load_peft(adapter) if target == "lora" else adapt_convert.load(pair.load(pair.base), adapter)
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(loaded), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_a_full_rank_lora_gives_the_fine_tune_back(pairs, tmp_path: Path, name: str) -> None:
    pair = pairs(name)
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=10**6, dtype="float32").save(tmp_path / "adapter")
    adapt_convert.merge(pair.base, adapter, tmp_path / "merged")
    ft, merged = load_file(pair.ft / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(ft)
    for key, value in ft.items():
        torch.testing.assert_close(merged[key], value, atol=2e-6, rtol=1e-5)


def test_a_merged_model_in_shards(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapt_convert.formats import checkpoint_writer

    monkeypatch.setattr(checkpoint_writer, "_SHARD", 20_000)
    pair = pairs("llama")
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=10**6, dtype="float32").save(tmp_path / "adapter")
    summary = adapt_convert.merge(pair.base, adapter, tmp_path / "merged")
    assert summary["shards"] == len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-4)


def energy(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    return sum(float((after[key].double() - before[key].double()).square().sum()) for key in before)


def test_what_rounding_loses_is_measured_and_said(make_pair: Any, tmp_path: Path) -> None:
    """A bfloat16 base and a change of a hundredth of it, against the sums taken here in float64; float32 keeps it."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter += 0.01 * parameter.std() * torch.randn_like(parameter)

    pair = make_pair(tmp_path, "llama", change)
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=32, dtype="float32").save(tmp_path / "lora")
    pair.load(pair.base).bfloat16().save_pretrained(tmp_path / "half")
    base = load_file(tmp_path / "half" / "model.safetensors")
    factors, exact = load_file(adapter / "adapter_model.safetensors"), {}
    for key in base:
        name = f"base_model.model.{key.removesuffix('.weight')}"
        added = factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double() if "_proj" in key else 0.0
        exact[key] = base[key].double() + added
    call = ["merge", str(tmp_path / "half"), str(adapter), "--json", "-o"]
    result = CliRunner().invoke(main, [*call, str(tmp_path / "merged")])
    summary, written = json.loads(result.stdout), load_file(tmp_path / "merged" / "model.safetensors")
    expected = energy(written, exact) / energy(exact, base)
    assert summary["rounding_loss"] == pytest.approx(expected, rel=1e-4)
    assert 0.01 < expected < 1
    assert result.stderr == (
        f"Note: rounding to bfloat16 lost {expected:.1%} of what the adapter changes (energy); "
        "--dtype float32 keeps it, and so does running the adapter unmerged\n"
    )
    assert json.loads((tmp_path / "merged" / "conversion.json").read_text())["rounding_loss"] == summary["rounding_loss"]
    result = CliRunner().invoke(main, [*call, str(tmp_path / "whole"), "--dtype", "float32"])
    written = load_file(tmp_path / "whole" / "model.safetensors")
    assert (json.loads(result.stdout)["rounding_loss"], result.stderr) == (0.0, "")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert energy(written, exact) < 1e-9 * energy(exact, base)
    assert next(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").parameters()).dtype == torch.float32
    assert CliRunner().invoke(main, [*call, str(tmp_path / "no"), "--dtype", "int8"]).exit_code == 1
