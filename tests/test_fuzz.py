"""500 damaged and hostile files: each is read correctly or refused in one line; none crashes, hangs, or writes outside OUT.

"Correctly" is what the owners of the formats make of the same file: `safetensors` for the tensors, PEFT's own rules for an
adapter's scale. The same seed makes the same 500 files.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from click.testing import CliRunner
from mutations import BYTES, CONFIG, INDEX, JSON, SAFETENSORS, Mutation
from processes import run_each
from safetensors import SafetensorError, safe_open

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.utils.other import get_pattern_key
    from transformers import LlamaConfig, LlamaForCausalLM

from adapt_convert import AdaptError, convert, lint
from adapt_convert.cli import main
from adapt_convert.convert.opening import open_base, open_source
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.location import locate
from adapt_convert.formats.profiles import PROFILES

SECONDS = 20
# kind -> (directory, file, mutations, how many)
FILES: dict[str, tuple[str, str, tuple[Mutation, ...], int]] = {
    "base weights": ("base", "model.safetensors", SAFETENSORS, 60),
    "fine-tune weights": ("ft", "model.safetensors", SAFETENSORS, 80),
    "a shard": ("shards", "model-00001-of-00002.safetensors", SAFETENSORS, 30),
    "index": ("shards", "model.safetensors.index.json", INDEX, 70),
    "base config": ("base", "config.json", JSON, 40),
    "fine-tune config": ("ft", "config.json", JSON, 40),
    "pickle": ("pickle", "pytorch_model.bin", BYTES, 20),
    "LoRA weights": ("lora", "adapter_model.safetensors", SAFETENSORS, 60),
    "LoRA config": ("lora", "adapter_config.json", CONFIG, 60),
    "LoRTA weights": ("lorta", "adapter_model.safetensors", SAFETENSORS, 20),
    "LoRTA config": ("lorta", "adapter_config.json", JSON, 20),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and one fine-tune in each of the forms in which it may lie on a disk."""
    place = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(place / "base")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(place / "ft")
    model.save_pretrained(place / "shards", max_shard_size="3KB")
    (place / "pickle").mkdir()
    torch.save(model.state_dict(), place / "pickle" / "pytorch_model.bin")
    shutil.copy(place / "ft" / "config.json", place / "pickle")
    convert(place / "base", place / "ft", to="lorta", rank=2, target_modules="all-linear").save(place / "lorta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
        peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(place / "lora")
    shutil.copy(place / "ft" / "model.safetensors", place / "secret.safetensors")
    return place


class Hang(BaseException):
    """Not an `Exception`: no reader may take it for a damaged file."""


def is_refused(action: Callable[[], object], case: str) -> bool:
    """Run it; whether it was refused, in one line. A crash or a hang fails the test, and says which file it was."""

    def stop(signum: int, frame: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    said: str | None = None
    try:
        action()
    except AdaptError as error:
        said = str(error)
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert said is None or (said and said.isprintable()), case
    return said is not None


def files_of(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in place.rglob("*") if not path.is_dir()}


def prepare(originals: Path, work: Path, kind: str, number: int) -> tuple[Path, Path, Path]:
    """A fresh copy of what one case reads, its file mutated; the same for the same number. Base, source and mutated file."""
    directory, name, mutations, _ = FILES[kind]
    shutil.rmtree(work, ignore_errors=True)
    for folder in {"base", "ft", directory}:
        shutil.copytree(originals / folder, work / folder)
    shutil.copy(originals / "secret.safetensors", work)
    file = work / directory / name
    random = Random(f"{kind} {number}")
    content = file.read_bytes()
    changed = random.choice(mutations)(content, random)
    file.write_bytes(changed)
    return work / "base", work / ("ft" if directory == "base" else directory), file


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out, counts = tmp_path / "work", tmp_path / "work" / "out", Counter[bool]()
    for number in range(FILES[kind][3]):
        base, source, file = prepare(originals, work, kind, number)
        monkeypatch.chdir(work)
        before, case = files_of(tmp_path), f"{kind} {number}"

        def convert_it() -> None:
            convert(base, source, rank=2).save(out)  # noqa: B023
            check_reading(kind, base, source, file)  # noqa: B023
            if file.suffix == ".json" and "LoR" not in kind:  # noqa: B023
                check_whole(base, source, originals)  # noqa: B023

        refused = is_refused(convert_it, case)
        counts[refused] += 1
        assert out.exists() is not refused, case
        for consumer in PROFILES if "LoRA" in kind else ():
            is_refused(lambda: lint(source, consumer), case)  # noqa: B023
        after = files_of(tmp_path)
        assert {name: time for name, time in after.items() if not name.startswith("work/out/")} == before, case
    assert counts[True] > 0, kind
    assert counts[False] > 0, kind


def check_reading(kind: str, base: Path, source: Path, file: Path) -> None:
    """What was read of a file that was accepted is what the library that owns the format reads of it."""
    if file.suffix == ".safetensors":
        store = TensorStore([file])
        try:
            with safe_open(file, framework="pt") as theirs:
                assert set(theirs.keys()) == set(store.infos)
                for name in theirs.keys():  # noqa: SIM118
                    assert torch.equal(theirs.get_tensor(name).view(torch.uint8), store.read(name).view(torch.uint8)), name
        except SafetensorError as error:
            raise AssertionError(f"accepted what safetensors refuses: {error}") from error
    elif kind == "LoRA config":
        config = json.loads(file.read_bytes())
        tensors = TensorStore(weight_files(locate(source)))
        for part in open_source(open_base(base), source).parts.values():
            module = part.name.removesuffix(".weight")
            a, b = (tensors.read(f"base_model.model.{module}.lora_{half}.weight") for half in "AB")
            patterns = config.get("alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns, module), config.get("lora_alpha", 8))
            scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
            torch.testing.assert_close(part.load().dense(), scale * (b @ a))


def check_whole(base: Path, source: Path, originals: Path) -> None:
    """A configuration or an index may change which tensors are read, never what is in them."""
    for store, original in ((open_base(base).store, "base"), (open_source(open_base(base), source).store, "ft")):
        with safe_open(originals / original / "model.safetensors", framework="pt") as theirs:
            for name in store.infos:
                assert torch.equal(theirs.get_tensor(name), store.read(name)), name


def test_there_are_500() -> None:
    assert sum(count for *_, count in FILES.values()) == 500


@pytest.mark.parametrize("kind", FILES)
def test_through_the_command_line(kind: str, originals: Path, tmp_path: Path) -> None:
    for number in range(3):
        base, source, _ = prepare(originals, tmp_path / "work", kind, number)
        done = CliRunner().invoke(main, ["delta", str(base), str(source), "--rank", "2", "-o", str(tmp_path / "work" / "out")])
        check_outcome(done.exit_code, done.stderr, tmp_path / "work" / "out")
        assert done.exception is None or isinstance(done.exception, SystemExit)


def test_through_a_process_of_its_own(originals: Path, tmp_path: Path) -> None:
    """JSON so deep that it may exhaust a real stack."""
    base, source, file = prepare(originals, tmp_path / "work", "LoRA config", 0)
    file.write_bytes(b"[" * 10**6)
    out = tmp_path / "work" / "out"
    command = [sys.executable, "-c", "from adapt_convert.cli import main; main()", "delta", str(base), str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    check_outcome(done.returncode, done.stderr, out)
    assert done.returncode == 1


COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {  # what reads the mutated file; B and S are the base and the source
    "base weights": (("plan", "B", "S"), ("inspect", "B")),
    "fine-tune weights": (("inspect", "S"),),
    "index": (("delta", "B", "S", "--rank", "2", "-o", "out"),),
    "base config": (("delta", "B", "S", "--to", "lorta", "--rank", "2", "-o", "out"),),
    "pickle": (("delta", "B", "S", "--rank", "2", "-o", "out"),),
    "LoRA weights": (("merge", "B", "S", "-o", "out"),),
    "LoRA config": (("lint", "S", "--for", "vllm"), ("merge", "B", "S", "-o", "out")),
    "LoRTA weights": (("merge", "B", "S", "-o", "out"),),
}


def test_through_processes_of_their_own(originals: Path, tmp_path: Path) -> None:
    """Every command on files that the 500 above have been read with, where a crash would be one."""
    commands = []
    for number, (kind, lines) in enumerate(COMMANDS.items()):
        base, source, _ = prepare(originals, tmp_path / str(number), kind, number)
        names = {"B": str(base), "S": str(source), "out": str(tmp_path / str(number) / "out")}
        commands += [[names.get(word, word) for word in line] for line in lines]
    before = files_of(tmp_path)
    for done in run_each(commands, tmp_path, tmp_path / "logs"):
        out = Path(done.arguments[-1])
        if done.arguments[0] == "lint":
            assert done.code in (0, 1), done
            assert "Traceback" not in done.stderr, done
        elif out.name == "out":
            check_outcome(done.code, done.stderr, out)
        else:
            assert done.code in (0, 1), done
            assert (done.code == 1) == (done.stderr.splitlines()[-1:] != [] and done.stderr.splitlines()[-1].startswith("Error: ")), done
    after = files_of(tmp_path)
    assert {name: time for name, time in after.items() if "/out/" not in name and not name.startswith("logs/")} == before


def check_outcome(code: int, stderr: str, out: Path) -> None:
    assert code in (0, 1), stderr
    assert "Traceback" not in stderr
    assert out.exists() is (code == 0)
    if code == 1:
        assert stderr.splitlines()[-1].startswith("Error: ")
        assert sum(line.startswith("Error: ") for line in stderr.splitlines()) == 1
