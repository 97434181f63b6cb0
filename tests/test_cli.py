"""The command line as typed: names, exit codes, help, JSON, and what a fresh directory looks like afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from adapt_convert.cli import main

COMMANDS = sorted(main.commands)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def here(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `base` and `ft` in it, as in the examples."""
    pair = pairs("llama")
    (tmp_path / "base").symlink_to(pair.base)
    (tmp_path / "ft").symlink_to(pair.ft)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_explains_every_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.opts}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_json_and_stands_in_the_readme(command: str) -> None:
    assert any("--json" in parameter.opts for parameter in main.commands[command].params)
    readme = Path(__file__).parent.parent / "README.md"
    assert f"adapt-convert {command}" in readme.read_text()


def test_the_reference_is_current() -> None:
    docs = Path(__file__).parent.parent / "docs"
    made = subprocess.run([sys.executable, docs / "make_cli_reference.py"], capture_output=True, text=True, check=True).stdout
    assert (docs / "cli.md").read_text() == made, "run: python docs/make_cli_reference.py > docs/cli.md"


@pytest.mark.parametrize(("target", "name"), [("lorta", "ft-lorta-r16"), ("lora", "ft-lora-r16")])
def test_as_typed_in_the_readme(here: Path, target: str, name: str) -> None:
    result = run("delta", "base", "ft", "--to", target, "--rank", 16)
    assert result.exit_code == 0, result.output
    assert f"written to {name}" in result.stdout
    assert sorted(path.name for path in here.iterdir()) == ["base", "ft", name]
    assert sorted(path.name for path in (here / name).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "conversion.json",
    ]


def test_json_is_all_there_is_on_standard_output(here: Path) -> None:
    result = run("delta", "base", "ft", "--rank", 4, "-o", "out", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["output"] == "out"
    assert report["captured_energy"] == json.loads((here / "out" / "conversion.json").read_text())["captured_energy"]
    assert result.stderr == ""
    assert json.loads(run("inspect", "base", "--json").stdout)["model_type"] == "llama"
    assert json.loads(run("inspect", "out", "--json").stdout)["kind"] == "LORA"
    assert json.loads(run("merge", "base", "out", "-o", "merged", "--json").stdout)["shards"] == 1


def test_strict_refuses_in_the_dry_run_what_headers_can_tell(here: Path, pairs: Any) -> None:
    from safetensors.torch import load_file, save_file

    (here / "short").mkdir()
    tensors = load_file(here / "ft" / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1" not in name}
    save_file(kept, here / "short" / "model.safetensors", metadata={"format": "pt"})
    (here / "short" / "config.json").write_text((here / "ft" / "config.json").read_text())
    for command in (["delta", "base", "short", "--strict", "--dry-run"], ["inspect", "base", "short", "--strict"]):
        result = run(*command)
        assert result.exit_code == 1
        assert "not in the fine-tune" in result.stderr


def test_dry_run_and_inspect_write_nothing(here: Path) -> None:
    dry = run("delta", "base", "ft", "--to", "lorta", "--dry-run", "--json")
    assert dry.exit_code == 0
    assert json.loads(dry.stdout) == json.loads(run("inspect", "base", "ft", "--to", "lorta", "--json").stdout)
    assert sorted(path.name for path in here.iterdir()) == ["base", "ft"]


def test_lists_split_at_commas_and_repeats_add_up(here: Path) -> None:
    run("delta", "base", "ft", "--target-modules", "q_proj,v_proj", "--target-modules", "o_proj", "-o", "out")
    assert json.loads((here / "out" / "adapter_config.json").read_text())["target_modules"] == ["o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", 0],
        ["--rank", -3],
        ["--rank", "abc"],
        ["--rank", "16.5"],
        ["--energy", "much"],
        ["--seed", "x"],
        ["--seed", 10**30],
        ["--device", "meta"],
        ["--target-modules", "q_proj,nosuch"],
        ["--energy", 0],
        ["--energy", 1.5],
        ["--energy", "nan"],
        ["--budget", "20 apples"],
        ["--budget", "0MB"],
        ["--rank", 4, "--energy", 0.5],
        ["--to", "dora"],
        ["--to", "lorta", "--energy", "0.5"],
        ["--dtype", "int8"],
        ["--device", "quantum"],
        ["--device", "cuda:7"],
        ["--orientation", "upside-down"],
        ["--exclude", "all-linear,q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head"],
        ["--target-modules", "no_such_module"],
    ],
)
def test_wrong_options_are_one_line(here: Path, arguments: list[object]) -> None:
    result = run("delta", "base", "ft", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == ["base", "ft"]


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--rank"], ["surplus"]])
def test_wrong_usage_exits_with_2(here: Path, arguments: list[object]) -> None:
    assert run("delta", "base", "ft", *arguments).exit_code == 2
    assert run("delta", "base").exit_code == 2


def test_the_module_runs_as_the_command_does(pairs: Any) -> None:
    """Without a word and with exit code 0 it would pass for a conversion."""
    command = [sys.executable, "-m", "adapt_convert.cli", "inspect", str(pairs("llama").base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model_type: llama" in done.stdout


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["delta", "nowhere", "ft"], 1), (["delta", "base"], 2)])
def test_the_console_script_ends_with_its_code_and_all_its_output(here: Path, arguments: list[str], code: int) -> None:
    script = "import atexit; from adapt_convert.cli import run; atexit.register(print, 'at exit'); run()"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.endswith("at exit\n")
    assert ("Error: " in done.stderr) == (code != 0)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
@pytest.mark.parametrize(("arguments", "code"), [("inspect base", 0), ("--version", 0), ("delta nowhere ft", 1), ("delta base", 2)])
def test_the_console_script_keeps_its_code_without_its_output(here: Path, closed: str, arguments: str, code: int) -> None:
    script = f"'{sys.executable}' -c 'from adapt_convert.cli import run; run()' {arguments} {closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == (code or int("full" in closed))
    assert "Traceback" not in done.stderr


def test_help_starts_fast_and_without_torch() -> None:
    code = "import sys; import adapt_convert, adapt_convert.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dry_run_needs_no_torch(here: Path) -> None:
    code = (
        "import sys; from adapt_convert.cli import main; "
        "main(['delta', 'base', 'ft', '--dry-run'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inspect_of_a_7b_pair_takes_less_than_a_second(tmp_path: Path) -> None:
    """A whole process on sparse files with the headers of a 7B model: whatever reads data, or imports torch, would take longer."""
    for side in ("base", "ft"):
        _sparse_7b(tmp_path / side)
    code = (
        "import json, sys, adapt_convert; plan = adapt_convert.inspect('base', 'ft', to='lora', rank=16); "
        "print(json.dumps(plan)); sys.exit('torch' in sys.modules)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 1
    plan = json.loads(done.stdout)
    assert plan["actions"] == {"factor": 225, "store": 66}
    assert plan["predicted_bytes"] > 10**8


def _sparse_7b(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 32, "hidden_size": 4096})
    )
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [32000, 4096], "lm_head.weight": [32000, 4096]}
    shapes["model.norm.weight"] = [4096]
    for layer in range(32):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{r}_proj.weight": [4096, 4096] for r in "qkvo"}
        shapes |= {f"{block}.mlp.{r}_proj.weight": [11008, 4096] for r in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": [4096, 11008]}
        shapes |= {f"{block}.{norm}_layernorm.weight": [4096] for norm in ("input", "post_attention")}
    weight_map: dict[str, str] = {}
    for number in range(3):
        names, file, position, header = list(shapes)[number::3], f"model-{number}.safetensors", 0, {}
        for name in names:
            size = 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, position + size]}
            position += size
        encoded = json.dumps(header).encode()
        with open(directory / file, "wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            out.truncate(8 + len(encoded) + position)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
