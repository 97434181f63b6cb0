"""Base plus written adapter, loaded by the adapter's own library, against weights computed by `torch.linalg.svd`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapt_convert

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
