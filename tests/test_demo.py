"""The demo on a model small enough to train in seconds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from adapt_convert.cli import main
from adapt_convert.convert import demo
from adapt_convert.formats.errors import AdaptError

TINY = demo.Recipe(
    width=48, layers=2, heads=4, key_value_heads=2, mlp=96, context=48, batch=8, base_steps=80, tune_steps=80, code_bytes=100_000
)


class Loops:
    """A progress function that remembers which loops ran."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        self.names.append(what)
        return items


def interrupted(items: Iterable[Any], what: str) -> Iterator[Any]:
    for number, item in enumerate(items):
        if what == "fine-tuning it" and number == 1:
            raise KeyboardInterrupt
        yield item


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("demo") / "small demo"
    return directory, demo.run_demo(directory, recipe=TINY)


def test_the_numbers(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, result = finished
    base, tuned, lorta, lora = result["models"]
    assert [Path(row["path"]).name for row in result["models"]] == ["base", "ft", "ft-lorta-r16", "ft-lora-r16"]
    assert tuned["perplexity"] < lora["perplexity"] < lorta["perplexity"] < base["perplexity"] < 257
    assert tuned["perplexity"] < 0.95 * base["perplexity"]
    assert base["captured_energy"] is None
    assert 0 < lorta["captured_energy"] < lora["captured_energy"] < 1
    assert lorta["bytes"] < lora["bytes"] < base["bytes"] == (directory / "base/model.safetensors").stat().st_size
    for row in (lorta, lora):
        written = json.loads((Path(row["path"]) / "conversion.json").read_text())
        assert row["captured_energy"] == written["captured_energy"]
        assert row["bytes"] == written["bytes"]
    json.dumps(result)


def test_perplexity_agrees_with_transformers(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, result = finished
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (directory / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(directory / "ft")(text)["input_ids"]
    assert ids == list(text.encode())
    windows = torch.tensor(ids[: len(ids) // TINY.context * TINY.context]).view(-1, TINY.context)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(directory / "ft")(input_ids=windows, labels=windows).loss
    assert result["models"][1]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_every_weight_is_fine_tuned(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = finished
    base, tuned = (load_file(directory / part / "model.safetensors") for part in ("base", "ft"))
    assert base.keys() == tuned.keys()
    assert not [name for name in base if torch.equal(base[name], tuned[name])]


def test_nothing_held_out_was_trained_on() -> None:
    (trained,), heldout = demo.prose()
    known = {" ".join(part.split()) for part in trained.decode().split("\n\n")}
    assert not known & {" ".join(part.split()) for part in heldout.decode().split("\n\n")}
    assert 0.05 < len(heldout) / (len(trained) + len(heldout)) < 0.2


def test_a_second_run_does_not_train(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, result = finished
    loops = Loops()
    before = (directory / "ft/model.safetensors").stat().st_mtime_ns
    assert demo.run_demo(directory, loops, TINY) == result
    assert loops.names
    assert not {"training the base", "fine-tuning it"} & set(loops.names)
    assert (directory / "ft/model.safetensors").stat().st_mtime_ns == before


def test_the_printed_commands_do_the_same(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, result = finished
    files = [directory / name / "adapter_model.safetensors" for name in ("ft-lorta-r16", "ft-lora-r16")]
    before = [file.read_bytes() for file in files]
    for command in result["commands"]:
        program, *arguments = shlex.split(command)
        assert program == "adapt-convert"
        outcome = CliRunner().invoke(main, arguments)
        assert outcome.exit_code == 0, outcome.output
    assert [file.read_bytes() for file in files] == before


def test_the_command_line_prints_every_row(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, result = finished
    monkeypatch.setattr(demo, "run_demo", lambda directory, progress: result)
    outcome = CliRunner().invoke(main, ["demo", str(directory)], env={"COLUMNS": "300"})
    assert outcome.exit_code == 0, outcome.output
    for row in result["models"]:
        assert row["name"] in outcome.output
        assert f"{row['perplexity']:.3f}" in outcome.output
    assert all(command in outcome.output for command in result["commands"])


def test_same_recipe_same_weights(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory, _ = finished
    state = torch.get_rng_state()
    demo.run_demo(tmp_path / "again", recipe=TINY)
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("base", "ft"):
        name = f"{part}/model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "parent" / "demo", interrupted, TINY)
    assert not list(tmp_path.iterdir())


def test_another_recipe_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(AdaptError, match="demo of another version"):
        demo.run_demo(finished[0], recipe=demo.Recipe())


def test_a_damaged_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(demo._marker(TINY), encoding="utf-8")
    with pytest.raises(AdaptError, match=r"heldout\.txt is gone; remove"):
        demo.run_demo(tmp_path, recipe=TINY)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("text")
    elif kind == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        (target / "notes").mkdir(parents=True)
    outcome = CliRunner().invoke(main, ["demo", str(target)])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(f"Error: {target}")
    assert "name another" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    outcome = CliRunner().invoke(main, ["demo", str(tmp_path / "demo")])
    assert outcome.exit_code == 1
    assert outcome.stderr == "Error: the demo runs models and needs transformers and peft: pip install 'adapt-convert[run]'\n"
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_checked() -> None:
    with pytest.raises(AdaptError, match="heads must divide width"):
        demo.Recipe(width=50)
