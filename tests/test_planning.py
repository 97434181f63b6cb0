"""`plan`: what it predicts is what `delta` then measures, and its spectra and noise floor are those of torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.planning import change as change_module
from adapt_convert.convert.planning.recommendation import recommend
from adapt_convert.convert.planning.rounding import step
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.plan_table import rounding_line
from adapt_convert.formats.sizes import size_text

from .test_latte import save_planted
from .test_lora_modules import save_loras


def planted(model: Any) -> None:
    """Rank 3 in every matrix of the layers, everything else as in the base."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            parameter += 0.1 * torch.randn(parameter.shape[0], 3) @ torch.randn(3, parameter.shape[1])


def more_tokens(model: Any) -> None:
    model.resize_token_embeddings(101)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


def _options(row: dict[str, Any]) -> dict[str, Any]:
    """A candidate's options, as `convert` takes them."""
    words = shlex.split(row["options"])
    return {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def written(pair: Any, row: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The report of the conversion that a candidate's options make."""
    adapt_convert.convert(pair.base, pair.ft, **_options(row)).save(directory)
    report: dict[str, Any] = json.loads((directory / "conversion.json").read_text())
    return report


CASES: dict[str, tuple[str, Callable[[Any], None] | None, dict[str, Any]]] = {
    "llama": ("llama", None, {"fit_seconds": 1e-6}),
    "planted": ("llama", planted, {"fit_seconds": 1e-6}),
    "bfloat16": ("qwen2", None, {"dtype": "bfloat16", "fit_seconds": 0}),
    "conv1d": ("gpt2", None, {"exclude": "wte,wpe", "fit_seconds": 0}),
    "post-norm": ("bert", None, {"target_modules": "attention", "fit_seconds": 0}),
    "more tokens": ("llama", more_tokens, {"fit_seconds": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_candidate_is_what_its_conversion_measures(case: str, make_pair: Any, tmp_path: Path) -> None:
    name, change, options = CASES[case]
    pair = make_pair(tmp_path, name, change)
    data = adapt_convert.plan(pair.base, pair.ft, **options).data
    assert {row["target"] for row in data["candidates"]} == {"lora", "latte"} | ({"lorta"} if options["fit_seconds"] else set())
    for number, row in enumerate(data["candidates"]):
        report = written(pair, row, tmp_path / str(number))
        for key in ("captured_energy", "captured_energy_of_all_changes"):
            assert report[key] == pytest.approx(row[key], abs=1e-5), row["options"]
        assert (report["bytes"], report["bytes_exact"]) == (row["bytes"], row["bytes_exact"]), row["options"]


def test_spectra_and_effective_ranks_are_those_of_torch(pairs: Any) -> None:
    pair = pairs("llama")
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    matrices = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data["matrices"]
    assert len(matrices) == 15
    for name, row in matrices.items():
        values = torch.linalg.svdvals((ft[name] - base[name]).double())
        torch.testing.assert_close(torch.tensor(row["singular_values"]).double(), values[:16], rtol=1e-4, atol=0)
        ratio = float(values.square().sum() ** 2 / values.pow(4).sum())
        assert row["effective_rank"] == pytest.approx([ratio, ratio], rel=1e-3)
        needed = int((torch.cumsum(values.square(), 0) < 0.9 * values.square().sum()).sum()) + 1
        assert row["rank_for_90_percent"] == needed


def test_what_a_cut_spectrum_does_not_know_is_bounded_or_left_out(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    whole = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data
    monkeypatch.setattr(change_module, "_WHOLE", 8)
    monkeypatch.setattr(change_module, "_LEADING", 4)
    cut = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data
    for name, row in cut["matrices"].items():
        low, high = row["effective_rank"]
        assert low < whole["matrices"][name]["effective_rank"][0] < high
        assert row["rank_for_90_percent"] is None
    options = {row["options"] for row in cut["candidates"] if row["target"] == "lora"}
    assert options == {"--to lora --rank 1", "--to lora --rank 2", "--to lora --rank 4", *(o for o in options if "--budget" in o)}
    known = {row["options"]: row["captured_energy"] for row in whole["candidates"]}
    for row in cut["candidates"]:
        assert row["captured_energy"] == pytest.approx(known[row["options"]], abs=1e-5)


def test_the_shares_of_kinds_layers_and_places_are_those_of_the_stored_tensors(pairs: Any) -> None:
    pair = pairs("llama")
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    energies = {name: float((ft[name] - base[name]).double().square().sum()) for name in base}
    total = sum(energies.values())
    data = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data
    assert data["energy"] == pytest.approx(total, rel=1e-5)
    assert sum(row["share"] for row in data["kinds"].values()) == pytest.approx(1)
    held = {"q": "q_proj", "down": "down_proj", "embedding": "embed_tokens", "head": "lm_head", "norm": "norm"}
    for kind, part in held.items():
        expected = sum(energy for name, energy in energies.items() if part in name) / total
        assert data["kinds"][kind]["share"] == pytest.approx(expected, rel=1e-5)
    assert data["layers"]["1"] == pytest.approx(sum(e for name, e in energies.items() if ".1." in name) / total, rel=1e-5)
    place = next(row for row in data["places"] if (row["kind"], row["layer"]) == ("up", 1))
    assert place["share"] == pytest.approx(energies["model.layers.1.mlp.up_proj.weight"] / total, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_are_the_distances_of_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(500, generator=generator) * 10.0**power for power in (-7, -3, 0, 3)]).to(dtype).abs()
    values = torch.cat([values, torch.tensor([1.0, 2.0, 0.5], dtype=dtype)])
    neighbours = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert torch.equal(step(values.float(), dtype), neighbours.float() - values.float())


def test_the_noise_floor_is_the_energy_that_rounding_has(make_pair: Any, tmp_path: Path) -> None:
    """A fine-tune whose true values are known: what storing it in bfloat16 did to them, and how many entries did not move."""
    pair = make_pair(tmp_path, "llama")
    base = {name: value.bfloat16() for name, value in load_file(pair.base / "model.safetensors").items()}
    true = {name: value.float() * (1 + 6e-3 * torch.randn_like(value.float())) for name, value in base.items()}
    ft = {name: value.bfloat16() for name, value in true.items()}
    for side, tensors in ((pair.base, base), (pair.ft, ft)):
        save_file(tensors, side / "model.safetensors", {"format": "pt"})
    data = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data
    lost = energy = 0.0
    for name, row in data["matrices"].items():
        stored = ft[name].float() - base[name].float()
        lost += float((ft[name].float() - true[name]).square().sum())
        energy += float(stored.square().sum())
        assert row["unchanged_entries"] == pytest.approx(float((stored == 0).float().mean()))
        neighbour = torch.nextafter(torch.maximum(ft[name].abs(), base[name].abs()), torch.tensor(torch.inf, dtype=torch.bfloat16))
        one_step = (stored != 0) & (stored.abs() <= (neighbour.float() - torch.maximum(ft[name].abs(), base[name].abs()).float()))
        assert row["one_step_entries"] == pytest.approx(float(one_step.float().mean()))
        assert row["one_step_energy"] == pytest.approx(float(stored[one_step].square().sum() / stored.square().sum()), rel=1e-4)
    assert data["rounding"]["noise_floor"] == pytest.approx(lost / energy, rel=0.05)
    assert 0.02 < lost / energy < 0.2
    assert f"{data['rounding']['noise_floor']:.1%} of the energy" in rounding_line(data)


def test_the_smallest_adapter_that_holds_enough_is_recommended(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", planted)
    data = adapt_convert.plan(pair.base, pair.ft, capture=0.95, fit_seconds=0).data
    report = written(pair, data["recommendation"], tmp_path / "out")
    assert report["captured_energy_of_all_changes"] >= 0.95
    assert report["bytes"] < data["full_bytes"] / 2
    enough = [row["bytes"] for row in data["candidates"] if row["captured_of_matrices"] >= 0.95]
    assert report["bytes"] == min(enough)
    changed = load_file(pair.ft / "model.safetensors")
    assert data["full_bytes"] == sum(value.nbytes for name, value in changed.items() if "proj" in name)


def test_a_fine_tune_of_full_rank_is_told_to_be_shipped_whole(pairs: Any) -> None:
    data = adapt_convert.plan(pairs("llama").base, pairs("llama").ft, fit_seconds=0).data
    assert data["recommendation"]["options"] is None
    sentence = data["recommendation"]["sentence"]
    assert "ship the full delta" in sentence
    small = [row["captured_of_matrices"] for row in data["candidates"] if row["bytes"] < data["full_bytes"] / 2]
    assert f"the most that fits is {max(small):.1%}" in sentence
    least = min((row for row in data["candidates"] if row["captured_of_matrices"] >= 0.9), key=lambda row: row["bytes"])
    assert f"{least['bytes'] / data['full_bytes']:.1%}, of them" in sentence
    assert f"({least['options']})" in sentence


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making
def test_an_adapter_is_planned_from_its_factors(tmp_path: Path) -> None:
    case = save_planted(tmp_path, "llama")
    lora = save_loras(case, [["q_proj", "v_proj", "down_proj"]], tmp_path)[0]
    data = adapt_convert.plan(tmp_path / "base", lora, fit_seconds=0).data
    assert data["rounding"] == {}
    assert data["full_bytes"] == (lora / "adapter_model.safetensors").stat().st_size - _data_start(lora / "adapter_model.safetensors")
    assert all(row["effective_rank"] == [1, 1] for row in data["matrices"].values())
    rows = [row for row in data["candidates"] if row["target"] == "lora"]
    assert [row["captured_energy"] for row in rows] == pytest.approx([1.0] * len(rows))
    for number, row in enumerate(data["candidates"]):
        report = adapt_convert.convert(tmp_path / "base", lora, **_options(row)).save(tmp_path / f"out{number}") / "conversion.json"
        assert json.loads(report.read_text())["captured_energy"] == pytest.approx(row["captured_energy"], abs=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making
def test_of_an_adapter_that_cannot_shrink_it_is_said_what_holds_it_all(tmp_path: Path) -> None:
    """A LoRA of rank 1 is as low-rank as can be: what fails is to halve its bytes."""
    case = save_planted(tmp_path, "llama")
    lora = save_loras(case, [["q_proj"]], tmp_path)[0]
    data = adapt_convert.plan(tmp_path / "base", lora, fit_seconds=0).data
    least = min(data["candidates"], key=lambda row: row["bytes"])
    assert least["captured_energy"] == pytest.approx(1)
    assert data["recommendation"] == {
        "options": None,
        "sentence": f"No adapter below half of the {data['full_bytes']} B of this adapter holds 90% of the change: the smallest that does "
        f"takes {size_text(least['bytes'])}, {least['bytes'] / data['full_bytes']:.1%} ({least['options']}), and none fits; "
        "ship it as it is, or measure with `adapt-convert validate` how the model behaves with less.",
    }


def _data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_an_architecture_without_latte_still_has_its_loras(pairs: Any) -> None:
    data = adapt_convert.plan(pairs("t5").base, pairs("t5").ft, fit_seconds=0).data
    assert {row["target"] for row in data["candidates"]} == {"lora"}
    assert set(data["left_out"]) == {"latte", "lorta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": 0.0}, "--capture"),
        ({"capture": 1.5}, "--capture"),
        ({"fit_seconds": -1.0}, "--fit-seconds"),
        ({"fit_seconds": float("nan")}, "--fit-seconds"),
        ({"target_modules": "nothing"}, "no module is called so"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str, pairs: Any) -> None:
    with pytest.raises(AdaptError, match=message):
        adapt_convert.plan(pairs("llama").base, pairs("llama").ft, **options)


def test_equal_models_have_no_plan(pairs: Any) -> None:
    with pytest.raises(AdaptError, match="nothing to plan"):
        adapt_convert.plan(pairs("llama").base, pairs("llama").base)


class _Page(HTMLParser):
    """Open tags, in order; every one has to be closed again."""

    void = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        assert not any(name in ("src", "onload") or (name == "href" and value != "data:,") for name, value in attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("li", "p"):
            while self.open[-1] in ("li", "p"):
                self.open.pop()
        assert self.open.pop() == tag


def test_a_share_near_all_is_said_as_it_was_asked() -> None:
    sentence = recommend([], 0.9999, 1000, True)["sentence"]
    assert "holds 99.99% of the change: no candidate of any size does, and none fits" in sentence


def test_the_command_prints_the_recommendation_and_writes_the_page_alone(pairs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pair = pairs("llama")
    arguments = ["plan", str(pair.base), str(pair.ft), "--fit-seconds", "0", "--html", "plan.html"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    sentence = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data["recommendation"]["sentence"]
    assert result.output.rstrip().endswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    page = _Page()
    text = (tmp_path / "plan.html").read_text()
    page.feed(text)
    assert not page.open
    assert page.seen.count("svg") == 3
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"https?://", text)
    again = CliRunner().invoke(main, arguments)
    assert (again.exit_code, "--overwrite" in again.output) == (1, True)
    assert CliRunner().invoke(main, [*arguments, "--overwrite", "--json"]).exit_code == 0


def test_json_is_what_the_function_returns(pairs: Any) -> None:
    pair = pairs("llama")
    result = CliRunner().invoke(main, ["plan", str(pair.base), str(pair.ft), "--fit-seconds", "0", "--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(adapt_convert.plan(pair.base, pair.ft, fit_seconds=0).data))
