"""docs/pipelines.md: its examples run, its tables are complete, options come from the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from test_batch import save_tokenizer

import adapt_convert
from adapt_convert.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "pipelines.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def low_rank(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight += 0.1 * torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))


@pytest.fixture
def here(make_pair: Any, tmp_path: Path) -> Path:
    """Fine-tunes that an adapter can hold, as a workflow that validates them needs."""
    pair = make_pair(tmp_path / "pair", "llama", low_rank)
    save_tokenizer(pair.base)
    (tmp_path / "fine-tunes").mkdir()
    (tmp_path / "base").symlink_to(pair.base)
    for name in ("ft-a", "ft-b"):
        (tmp_path / "fine-tunes" / name).symlink_to(pair.ft)
    return tmp_path


def test_the_github_workflow(here: Path) -> None:
    """The steps that need neither a registry nor the Hub, each in a shell of its own as the runner starts it."""
    job = yaml.safe_load(block("yaml"))["jobs"]["convert"]
    steps = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    offered = {name: value for name, value in job["env"].items() if "${{" not in value}
    environment = os.environ | offered | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = {}
    for name in ("Plan", "Convert", "Summarise", "Check what would be published"):
        command = ["bash", "-eo", "pipefail", "-c", steps.pop(name)]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (name, done.stderr)
        printed[name] = done.stdout
    assert list(steps) == ["Install", "Publish"]
    assert "ft-b-lora-r16: to convert" in printed["Plan"]
    assert json.loads((here / "result.json").read_text())["counts"] == {"converted": 2}
    assert re.fullmatch(r"(ft-[ab]-lora-r16 converted [01]\.\d+\n){2}", printed["Summarise"])
    assert "would be sent to my-org/ft-a-lora-r16" in printed["Check what would be published"]


def test_the_functions_of_a_scheduler(here: Path) -> None:
    (here / "flow.py").write_text(block("python"))
    done = subprocess.run([sys.executable, "flow.py"], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["my-org/ft-a-lora-r16", "my-org/ft-b-lora-r16"]


def test_every_command_has_its_python_call() -> None:
    calls = dict(re.findall(r"^\| `(\w+)` \| `adapt_convert\.(\w+)\(", PAGE, re.MULTILINE))
    assert set(calls) == set(main.commands)
    for name in calls.values():
        assert callable(getattr(adapt_convert, name))


def test_options_from_the_environment(here: Path) -> None:
    environment = {"ADAPT_CONVERT_DELTA_RANK": "3", "ADAPT_CONVERT_DELTA_EXCLUDE": "lm_head q_proj", "ADAPT_CONVERT_DELTA_JSON": "1"}
    arguments = ["delta", str(here / "base"), str(here / "fine-tunes" / "ft-a"), "-o"]
    done = CliRunner().invoke(main, [*arguments, str(here / "out")], env=environment)
    report = json.loads(done.stdout)
    assert report["options"]["rank"] == 3
    assert report["options"]["exclude"] == ["lm_head", "q_proj"]
    done = CliRunner().invoke(main, [*arguments, str(here / "typed"), "--rank", "2"], env=environment)
    assert json.loads(done.stdout)["options"]["rank"] == 2


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_option_has_a_variable_named_as_it_is_typed(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            typed = max(parameter.opts, key=len).removeprefix("--")
            assert parameter.envvar == "ADAPT_CONVERT_" + f"{command}_{typed}".upper().replace("-", "_")
