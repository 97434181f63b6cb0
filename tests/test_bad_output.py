"""Destinations that cannot be written, that exist, or that an interrupt leaves half done."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.formats import safetensors_file
from adapt_convert.formats.atomic import atomic_directory, terminate_as_interrupt
from adapt_convert.formats.errors import AdaptError


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def delta(pair, out: Path | str, *arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["delta", str(pair.base), str(pair.ft), "--rank", "2", "-o", str(out), *arguments])


def merge(pair, adapter: Path, out: Path, *arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["merge", str(pair.base), str(adapter), "-o", str(out), *arguments])


def error_of(result: click.testing.Result) -> str:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert result.stderr.count("Error:") == 1
    assert last.isprintable()  # a name cannot drive the terminal
    return last


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in sorted(directory.rglob("*"))}


def test_an_existing_destination_is_kept_unless_overwrite(pairs, work: Path) -> None:
    pair, out = pairs("llama"), work / "out"
    assert delta(pair, out).exit_code == 0
    assert [p.name for p in work.iterdir()] == ["out"]
    before = snapshot(out)
    result = delta(pair, out, "--rank", "3")
    assert "already exists; choose another with -o, or replace it with --overwrite" in error_of(result)
    assert result.stderr.count("\n") == 1  # refused before any work
    assert snapshot(out) == before
    assert delta(pair, out, "--rank", "3", "--overwrite").exit_code == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    assert [p.name for p in work.iterdir()] == ["out"]


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the first bytes of a weights file."""
    real = open

    def full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        if mode == "wb" and str(path).endswith(".safetensors"):
            file.write(b"half")

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def write(self, data: bytes) -> int:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()
        return file

    monkeypatch.setattr(safetensors_file, "open", full, raising=False)


FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], str]] = {
    "full disk": (fill_the_disk, "out: cannot be written: No space left on device"),
    "publishing": (lambda m: m.setattr(Path, "rename", broken_rename()), "out: cannot be written: Input/output error"),
}


def broken_rename() -> Callable[..., Any]:
    """The rename that would publish the new directory fails; the one that puts the old one back does not."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".adapt-convert-") and Path(target).name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    return rename


@pytest.mark.parametrize("command", ["delta", "merge"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_run_leaves_what_was_there(
    pairs, work: Path, monkeypatch: pytest.MonkeyPatch, failure: str, overwrite: bool, command: str
) -> None:
    pair, out = pairs("llama"), work / "out"
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=1).save(work.parent / "adapter")
    if overwrite:
        assert merge(pair, adapter, out).exit_code == 0
    before = snapshot(work)
    fail, message = FAILURES[failure]
    fail(monkeypatch)
    arguments = ["--overwrite"] if overwrite else []
    result = delta(pair, out, *arguments) if command == "delta" else merge(pair, adapter, out, *arguments)
    monkeypatch.undo()
    assert message in error_of(result)
    assert snapshot(work) == before


def test_a_file_size_limit_in_a_real_process(pairs, work: Path) -> None:
    pair = pairs("llama")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(patch=""), "delta", pair.base, pair.ft, "-o", work / "new" / "deep" / "out"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("out: cannot be written: File too large")
    assert "Traceback" not in done.stderr
    assert list(work.iterdir()) == []  # the parents that were made for it are gone too


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


def test_destinations_that_cannot_be_written(pairs, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    (work / "file").write_text("mine")
    (work / "link").symlink_to("nowhere")
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("mine")
    (work / "empty").mkdir()
    before = snapshot(work)
    cases = {
        work / "file": "already exists",
        work / "file" / "out": "file is not a directory",
        work / "file" / "deep" / "out": "not a directory",
        work / "link": "already exists",
        work / "mine": "already exists",
        Path("/proc/out"): "/proc cannot be written to",
        Path("/proc/self/deep/out"): "cannot be written to",
        work / ("n" * 300): "too long",
        os.fsdecode(bytes(work) + b"/\xff"): "not valid UTF-8; rename it",
        work / ("\x07\x9b\n" + "n" * 300): "too long",
    }
    for out, message in cases.items():
        result = delta(pair, out)
        assert message in error_of(result), out
        assert result.stderr.count("\n") == 1  # refused before any work
    for out, message in {
        work / "file": "is not a directory",
        work / "link": "is not a directory",
        work / "mine": "was not written by adapt-convert; it is not replaced",
        pair.base: "was not written by adapt-convert; it is not replaced",
    }.items():
        assert message in error_of(delta(pair, out, "--overwrite"))
    monkeypatch.chdir(work / "empty")
    for out in (".", "../empty", ""):
        error_of(delta(pair, out, "--overwrite"))
    read_only(monkeypatch)
    assert "work cannot be written to: Read-only file system" in error_of(delta(pair, work / "out"))
    monkeypatch.undo()
    assert snapshot(work) == before
    assert delta(pair, work / "empty", "--overwrite").exit_code == 0


@pytest.mark.parametrize("role", ["base", "source"])
def test_an_input_is_never_overwritten(pairs, work: Path, role: str) -> None:
    """A merged model and an adapter are this project's own output, but not to be replaced by what is made of them."""
    pair = pairs("llama")
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=2).save(work / "adapter")
    adapt_convert.merge(pair.base, adapter, work / "merged")
    before = snapshot(work)
    base, source, out = (work / "merged", pair.ft, work / "merged") if role == "base" else (pair.base, adapter, adapter)
    command = ["delta", str(base), str(source), "--rank", "1", "-o", str(out), "--overwrite"]
    result = click.testing.CliRunner().invoke(main, command)
    assert "is read by this run" in error_of(result)
    assert snapshot(work) == before


SLOW_SOLVING = "from adapt_convert.convert import lora as m; real = m.factorise; m.factorise = slow"
SLOW_WRITING = "import adapt_convert.formats.peft as m; real = m.write_safetensors; m.write_safetensors = slow"
PROGRAM = """
import sys, time
def slow(*args, **kwargs):
    result = real(*args, **kwargs)
    open(sys.argv[-1], "w").close()
    time.sleep(10)
    return result
{patch}
from adapt_convert.cli import main
main(sys.argv[1:8])
"""


@pytest.mark.parametrize(
    ("patch", "number", "code"),
    [(patch, number, 130) for patch in (SLOW_SOLVING, SLOW_WRITING) for number in (signal.SIGINT, signal.SIGTERM)],
    ids=["Ctrl-C while solving", "SIGTERM while solving", "Ctrl-C while writing", "SIGTERM while writing"],
)
def test_an_interrupt_leaves_nothing(pairs, work: Path, patch: str, number: int, code: int) -> None:
    pair = pairs("llama")
    assert delta(pair, work / "out").exit_code == 0
    before = snapshot(work)
    flag = work.parent / "flag"
    arguments = ["delta", str(pair.base), str(pair.ft), "-o", str(work / "out"), "--rank=4", "--overwrite", str(flag)]
    program = PROGRAM.format(patch=patch)
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)
    while not flag.exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert (len(list(work.iterdir())) > 1) == (patch is SLOW_WRITING)  # there is something to leave behind
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == "Error: interrupted; nothing was written"
    assert "Traceback" not in stderr
    assert snapshot(work) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminate_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


SLOW_VALIDATING = "from adapt_convert.convert.validation import validate as m; real = lambda *a, **k: None; m.validate = slow"


def test_an_interrupt_after_the_writing_says_what_stays(pairs, work: Path) -> None:
    pair, flag = pairs("llama"), work.parent / "flag"
    arguments = ["delta", str(pair.base), str(pair.ft), "-o", str(work / "out"), "--rank=4", "--validate", str(flag)]
    program = PROGRAM.format(patch=SLOW_VALIDATING)
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not flag.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == f"Error: interrupted; {work / 'out'} was written before and stays"
    assert (work / "out" / "conversion.json").is_file()


def test_the_library_call_is_atomic_too(pairs, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    conversion = adapt_convert.convert(pair.base, pair.ft, rank=1)
    fill_the_disk(monkeypatch)
    with pytest.raises(AdaptError, match="No space left"):
        conversion.save(work / "out")
    assert list(work.iterdir()) == []


def test_a_directory_that_appears_meanwhile_is_not_replaced(work: Path) -> None:
    def write() -> None:
        with atomic_directory(work / "out") as staging:
            (staging / "new").write_text("new")
            (work / "out").mkdir()
            (work / "out" / "theirs").write_text("theirs")

    with pytest.raises(AdaptError, match="cannot be written: Directory not empty"):
        write()
    assert snapshot(work) == {"out": b"", "out/theirs": b"theirs"}


def test_permissions_follow_the_umask(work: Path) -> None:
    with atomic_directory(work / "out") as staging:
        torch.save({}, staging / "x")
    assert oct((work / "out").stat().st_mode & 0o777) == oct(0o777 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
