"""What `bundle --dry-run` foresees, held against the bundles that are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibrating import plant
from click.testing import CliRunner
from conftest import save_pair
from families import tiny

import adapt_convert
from adapt_convert.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two fine-tunes of it whose q and v changed by matrices of rank 5."""
    directory = tmp_path_factory.mktemp("models")
    model_class, config = tiny("llama")
    pair = save_pair(directory, model_class, config, lambda model: plant(model, 5, ("q_proj", "v_proj")))
    other = pair.load(pair.base)
    with torch.no_grad():
        plant(other, 5, ("q_proj", "v_proj"))
    other.save_pretrained(directory / "other")
    return [str(pair.base), str(pair.ft), str(directory / "other")]


@pytest.mark.parametrize("to", ["shared-lora", "latte"])
def test_rows_are_what_bundles_of_these_ranks_hold(models: list[str], tmp_path: Path, to: str) -> None:
    result = CliRunner().invoke(main, ["bundle", *models, "--to", to, "--dry-run", "--json", "-o", str(tmp_path / "none")])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "none").exists()
    rows = json.loads(result.stdout)["candidates"]
    # Two adapters of rank 5: a shared LoRA is exact from the sum of the ranks on; a common basis of eight matrices only at full width.
    assert [row["options"] for row in rows] == [
        f"--to {to} --rank {rank}" for rank in ((4, 8, 16) if to == "shared-lora" else (4, 8, 16, 32))
    ]
    assert all(share > 1 - 1e-5 for share in rows[-1]["tasks"].values())
    assert min(rows[-2]["tasks"].values()) < 0.999
    for row in rows[:2]:
        rank = int(row["options"].rpartition(" ")[2])
        conversion = adapt_convert.bundle(models[0], models[1:], to=to, rank=rank)
        out = conversion.save(tmp_path / f"r{rank}")
        (file,) = out.glob("*.safetensors")
        assert file.stat().st_size == row["bytes"]
        written = json.loads((out / "conversion.json").read_text())
        assert written["bytes_exact"] == row["bytes_exact"]
        assert written["tasks"] == pytest.approx(row["tasks"], abs=1e-3)
        assert written["captured_energy"] == pytest.approx(row["captured_energy"], abs=1e-3)


def test_a_given_rank_is_the_only_one_and_the_table_names_the_adapters(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["bundle", *models, "--to", "shared-lora", "--rank", "6", "--dry-run"], env={"COLUMNS": "150"})
    assert result.exit_code == 0
    assert all(text in result.stdout for text in ("--to shared-lora --rank 6", "ft", "other", "for each"))
    assert result.stdout.count("--rank") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_base_has_nothing_to_hold(models: list[str], tmp_path: Path) -> None:
    given = ["bundle", models[0], models[1], models[0], "--to", "shared-lora", "--rank", "6", "--dry-run", "-o", str(tmp_path / "none")]
    result = CliRunner().invoke(main, given, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert " - " in result.stdout


def test_a_budget_for_a_bundle_is_refused_as_such(models: list[str], tmp_path: Path) -> None:
    given = ["bundle", *models, "--to", "latte", "--budget", "1MB", "--dry-run", "-o", str(tmp_path / "none")]
    result = CliRunner().invoke(main, given)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "--budget" in result.stderr
    assert "contradict" not in result.stderr
