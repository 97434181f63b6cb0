"""`plan --calib`: what of the change reaches the outputs, against the moments of transformers' own activations and torch's SVD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibrating import stored_moments, token_file
from click.testing import CliRunner
from conftest import Pair
from safetensors.torch import load_file

import adapt_convert
from adapt_convert.cli import main


def test_shares_of_the_outputs_are_those_of_dense_algebra(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    data = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0, calib=text, calib_tokens=900).data
    moments = stored_moments(own_cache)
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    energies: dict[str, float] = {}
    kept = 0.0
    for name in data["matrices"]:
        D, C = (ft[name] - base[name]).double(), moments.of(name.removesuffix(".weight")).double()
        energies[name] = float(torch.trace(D @ C @ D.T))  # E||D x||^2
        values, vectors = torch.linalg.eigh(C)
        weighted = torch.linalg.svdvals(D @ (vectors * values.clamp_min(0).sqrt()))
        kept += float(weighted[:4].square().sum())
    total = sum(energies.values())
    found = data["on_inputs"]
    for kind, part in (("q", "q_proj"), ("down", "down_proj"), ("head", "lm_head")):
        expected = sum(energy for name, energy in energies.items() if part in name) / total
        assert found["kinds"][kind]["share"] == pytest.approx(expected, rel=1e-3)
    assert found["lora_by_rank"]["4"] == pytest.approx(kept / total, abs=1e-3)
    assert found["kl_of_base"] > 0


def test_the_command_prints_them_and_refuses_missing_text(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    arguments = ["plan", str(pair.base), str(pair.ft), "--fit-seconds", "0", "--calib-tokens", "900", "--calib"]
    shown = CliRunner().invoke(main, [*arguments, str(text)])
    assert shown.exit_code == 0, shown.output
    assert "reaches the outputs" in shown.output
    missing = CliRunner().invoke(main, [*arguments, str(tmp_path / "missing.txt")])
    assert (missing.exit_code, len(missing.output.strip().splitlines())) == (1, 1)
