"""Budgets of targets that have one rank, held against the files that are written; and budgets of experts, which PEFT gives one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import plant, token_file
from click.testing import CliRunner
from conftest import Pair, save_pair
from families import tiny
from safetensors.torch import load_file

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.cli import main

pytestmark = pytest.mark.usefixtures("own_cache")
TARGETS: dict[str, dict[str, Any]] = {
    "lorta": {"to": "lorta"},
    "lorta of all": {"to": "lorta", "target_modules": "all-linear", "dtype": "bfloat16"},
    "latte": {"to": "latte"},
    "latte by layer": {"to": "latte", "segments": 2, "dtype": "float16"},
}
FITTED: dict[str, dict[str, Any]] = {
    "loda": {"to": "loda", "exclude": "lm_head,gate_proj,up_proj,down_proj"},
    "r-loda+": {"to": "r-loda+", "base_rank": 6},
    "s-loda": {"to": "s-loda", "keep": 0.4, "target_modules": "attention"},
}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair in which all linear layers changed, of full rank, and nothing else did: no tensor is stored exactly."""
    model_class, config = tiny("llama")
    return save_pair(tmp_path_factory.mktemp("matrices"), model_class, config, lambda model: plant(model, 32))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("text") / "ids.jsonl")


def written(pair: Pair, out: Path, **options: Any) -> tuple[int, int]:
    """The rank of an adapter and the size of its file."""
    conversion = adapt_convert.convert(pair.base, pair.ft, **options)
    conversion.save(out, overwrite=True)
    (file,) = out.glob("*.safetensors")
    assert conversion.report["bytes"] == file.stat().st_size
    assert conversion.report["bytes_exact"] == 0
    return conversion.report["options"]["rank"], file.stat().st_size


@pytest.mark.parametrize("case", TARGETS)
def test_the_largest_rank_whose_file_fits(matrices: Pair, tmp_path: Path, case: str) -> None:
    """To the byte: with the size of one rank's file as the budget that rank is written, with one byte less the one below."""
    options, out = TARGETS[case], tmp_path / "out"
    exactly = {"dtype": "float32"} | options
    _, size = written(matrices, out, rank=4, **exactly)
    _, less = written(matrices, out, rank=3, **exactly)
    assert written(matrices, out, budget=size, **options) == (4, size)
    assert written(matrices, out, budget=size - 1, **options) == (3, less)
    (note,) = (
        note for note in adapt_convert.inspect(matrices.base, matrices.ft, budget=size - 1, **options)["notes"] if "--budget" in note
    )
    assert note.startswith(f"--budget {size - 1} bytes: rank 3, at most {less} bytes")
    assert note.endswith(f"rank 4 would take {size}")


@pytest.mark.parametrize("case", FITTED)
def test_the_largest_loda_that_fits(matrices: Pair, text: Path, tmp_path: Path, case: str) -> None:
    """f1 and f2 count although a fit may do without them, so the file of a LoDA+ may be smaller."""
    options = FITTED[case] | {"calib": text, "calib_tokens": 512, "exclude": "lm_head,gate_proj,up_proj,down_proj"}
    budget = 24_000 if "base_rank" in options else 12_000
    rank, size = written(matrices, tmp_path / "out", budget=budget, **options)
    assert size <= budget
    assert 1 < rank < 32
    if not options["to"].endswith("+"):
        assert written(matrices, tmp_path / "out", rank=rank + 1, **options)[1] > budget


@pytest.mark.parametrize("case", ["lorta", "latte", "loda"])
def test_a_budget_that_nothing_fits_names_the_smallest(matrices: Pair, text: Path, tmp_path: Path, case: str) -> None:
    options = (TARGETS | FITTED)[case] | {"dtype": "float32"} | ({"calib": text, "calib_tokens": 512} if case == "loda" else {})
    _, smallest = written(matrices, tmp_path / "out", rank=1, **options)
    for run in (adapt_convert.convert, adapt_convert.inspect):
        with pytest.raises(AdaptError, match=rf"^--budget {smallest - 1} bytes: the smallest {case}, of rank 1, takes up to {smallest}$"):
            run(matrices.base, matrices.ft, budget=smallest - 1, **options)


@pytest.mark.parametrize("case", TARGETS)
def test_a_budget_beyond_full_rank(matrices: Pair, case: str) -> None:
    """32 is the width of the residual stream and the shorter side of every matrix."""
    notes = adapt_convert.inspect(matrices.base, matrices.ft, budget="1GB", **TARGETS[case])["notes"]
    assert any(": rank 32, at most " in note and note.endswith("no larger one is tried") for note in notes)


def test_a_share_of_the_base_and_bytes_are_the_same_budget(matrices: Pair) -> None:
    whole = sum(tensor.nbytes for tensor in load_file(matrices.base / "model.safetensors").values())
    given = [0.1, "10%", int(0.1 * whole), f"{int(0.1 * whole) / 1000}kB"]
    notes = [adapt_convert.inspect(matrices.base, matrices.ft, to="latte", budget=budget)["notes"] for budget in given]
    assert notes == [notes[0]] * 4
    assert "--budget" in str(notes[0])


def test_what_is_stored_exactly_comes_on_top(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """GPT-2: biases of every matrix count, embeddings and norms do not."""
    pair = pairs("gpt2")
    conversion = adapt_convert.convert(pair.base, pair.ft, to="latte", budget=20_000)
    conversion.save(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "latte.safetensors")
    counted = sum(value.nbytes for name, value in tensors.items() if ".exact." not in name)
    rank = conversion.report["options"]["rank"]
    assert any(".bias." in name for name in tensors)
    assert counted <= 20_000 < counted + counted / rank
    assert conversion.report["bytes_exact"] > 10_000


def test_the_command_says_the_rank_before_anything_is_read(matrices: Pair, tmp_path: Path) -> None:
    arguments = ["delta", str(matrices.base), str(matrices.ft), "--to", "lorta", "--budget", "1kB", "-o", str(tmp_path / "out")]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 0
    assert "note: --budget 1000 bytes: rank " in dry.stdout
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    rank = dry.stdout.partition("bytes: rank ")[2].partition(",")[0]
    assert f'"r": {rank},' in (tmp_path / "out" / "adapter_config.json").read_text()


def test_tasks_of_a_bundle_have_no_budget(matrices: Pair) -> None:
    with pytest.raises(AdaptError, match="--budget: the tasks of a bundle share their bases; give --rank or --energy"):
        adapt_convert.bundle(matrices.base, [matrices.ft], budget=9000)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_budget_of_experts_is_that_of_their_padded_factors(tmp_path: Path, name: str) -> None:
    """PEFT holds one rank for all experts (of gpt-oss for those of a stack), which the greedy choice over numpy's spectra has to know."""
    pair = save_pair(tmp_path, *tiny(name), lambda model: [p.add_(0.05 * torch.randn_like(p)) for p in model.parameters()])
    kept = "embed_tokens,lm_head,norm,gate,router,sinks" + (",gate_up_proj_bias,down_proj_bias" if name == "gpt_oss" else "")
    budget = 30_000
    out = adapt_convert.convert(pair.base, pair.ft, budget=budget, exclude=kept).save(tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    size = sum(tensor.nbytes for key, tensor in tensors.items() if ".lora_" in key)
    assert size <= budget
    spectra: dict[str, list[np.ndarray]] = {}
    costs: dict[str, int] = {}
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    for key, value in base.items():
        if ".experts." in key and not key.endswith("_bias"):
            unit = "experts" if name == "mixtral" else key
            each = (ft[key] - value).double().reshape(-1, *value.shape[-2:])
        elif "self_attn" in key and key.endswith("proj.weight"):
            unit, each = key, (ft[key] - value).double()[None]
        else:
            continue
        costs[unit] = costs.get(unit, 0) + 4 * len(each) * sum(each.shape[1:])
        spectra.setdefault(unit, []).extend(np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2 for matrix in each)
    offers = []
    for unit, values in spectra.items():
        longest = max(map(len, values))
        summed = sum(np.pad(own, (0, longest - len(own))) for own in values)
        offers += [(energy / costs[unit], unit) for energy in summed]
    left, ranks = budget, dict[str, int]()
    for _, unit in sorted(offers, reverse=True):
        if costs[unit] <= left:
            left, ranks[unit] = left - costs[unit], ranks.get(unit, 0) + 1
    assert size == budget - left
    assert any(".experts." in unit or unit == "experts" for unit in ranks)
    found = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0, exclude=kept).data["candidates"]
    for one in found:
        if "--budget" in one["options"]:
            given = int(one["options"].partition("--budget ")[2].partition("B")[0])
            again = adapt_convert.convert(pair.base, pair.ft, budget=given, exclude=kept)
            again.save(tmp_path / "again", overwrite=True)
            assert (again.report["bytes"], pytest.approx(again.report["captured_energy"], abs=1e-3)) == (
                one["bytes"],
                one["captured_energy"],
            )
