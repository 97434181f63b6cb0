"""Batches: whose files are replaced, what a later run believes, copies elsewhere, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_batch import fine_tunes, outputs

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.batch.state import HIDDEN
from adapt_convert.formats import remote


@pytest.fixture(scope="module")
def work(pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("safety")
    (root / "base").symlink_to(pairs("llama").base)
    fine_tunes(pairs("llama").base, root / "fts", 2)
    return root


def test_what_is_not_ours_is_not_replaced(work: Path, tmp_path: Path) -> None:
    manifest = {"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "output": "out", "rank": 2}

    def batch(**changes: Any) -> dict[str, Any]:
        return adapt_convert.batch({"jobs": [manifest | changes]}, tmp_path / "batch")["jobs"][0]

    out = tmp_path / "batch" / "out"
    assert batch()["status"] == "converted"
    (out / "notes.txt").write_text("mine")
    assert batch()["skipped"]
    refused = batch(rank=3)
    assert "holds notes.txt, which is not this batch's" in refused["error"]
    assert "notes.txt" in adapt_convert.batch({"jobs": [manifest | {"rank": 3}]}, tmp_path / "batch", dry_run=True)["jobs"][0]["error"]
    (out / "notes.txt").unlink()
    shutil.rmtree(out)
    adapt_convert.convert(work / "base", work / "fts" / "base-01", rank=2).save(out)
    before = outputs(tmp_path / "batch")
    assert "was replaced by another run" in batch()["error"]
    assert "was replaced by another run" in batch(rank=3)["error"]
    assert outputs(tmp_path / "batch") == before
    assert batch(rank=3, overwrite=True)["status"] == "converted"


def test_what_was_changed_is_done_again(work: Path, tmp_path: Path) -> None:
    job = {"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "output": "out", "rank": 2}
    adapt_convert.batch({"jobs": [job]}, tmp_path)
    before = outputs(tmp_path)
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # of the same size
    assert not adapt_convert.batch({"jobs": [job]}, tmp_path)["jobs"][0]["skipped"]
    (tmp_path / "out" / "README.md").unlink()
    assert not adapt_convert.batch({"jobs": [job]}, tmp_path)["jobs"][0]["skipped"]
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"settings": 1}', "base", "files", "result"])
def test_a_damaged_record_is_none(work: Path, tmp_path: Path, damage: str) -> None:
    jobs = [{"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "output": "out", "rank": 2}]
    adapt_convert.batch({"jobs": jobs}, tmp_path)
    (record,) = (tmp_path / HIDDEN / "jobs").glob("*/state.json")
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {damage: {"revision": 3}}) if damage.isalpha() else damage)
    with pytest.raises(adapt_convert.AdaptError, match="already exists"):
        adapt_convert.batch({"jobs": jobs}, tmp_path, dry_run=True)
    shutil.rmtree(tmp_path / "out")
    assert adapt_convert.batch({"jobs": jobs}, tmp_path)["counts"] == {"converted": 1}


def test_any_name_and_no_chain(work: Path, tmp_path: Path) -> None:
    job = {"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "rank": 2, "output": "ü" * 127}
    assert adapt_convert.batch({"jobs": [job]}, tmp_path)["counts"] == {"converted": 1}
    chained = job | {"source": str(tmp_path / job["output"]), "output": "second", "to": "lorta"}
    with pytest.raises(adapt_convert.AdaptError, match="the output of another job"):
        adapt_convert.batch({"jobs": [job, chained]}, tmp_path)
    assert adapt_convert.batch({"jobs": [chained]}, tmp_path)["counts"] == {"converted": 1}


def test_refused_before_anything_starts(work: Path, tmp_path: Path) -> None:
    job = {"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "output": "out"}
    wrong: list[dict[str, Any]] = [
        {"memory": 10**9, "engine": "ray"},
        {"address": "127.0.0.1:1"},
        {"jobs": "4"},
        {"retry": "x"},
        {"copy_to": f"file://{tmp_path}/batch"},
        {"copy_to": f"file://{tmp_path}/batch/x/.."},
        {"copy_to": f"file://{tmp_path}/batch/far"},
    ]
    for options in wrong:
        with pytest.raises(adapt_convert.AdaptError):
            adapt_convert.batch({"jobs": [job]}, tmp_path / "batch", **options)
    with pytest.raises(adapt_convert.AdaptError, match="an empty path"):
        adapt_convert.batch({"jobs": [job]}, "")
    assert CliRunner().invoke(main, ["batch", "jobs.yaml", "-o", ""]).exit_code == 1
    adapter = adapt_convert.convert(job["base"], job["source"], to="latte", rank=8).save(tmp_path / "latte")
    jobs = [job | {"validate": True}, job | {"output": "again", "source": str(adapter)}]
    first, second = adapt_convert.batch({"jobs": jobs}, tmp_path / "batch", dry_run=True)["jobs"]
    assert "have no tokenizer" in first["error"]
    assert "is a LatTE already" in second["error"]
    assert not (tmp_path / "batch").exists()


def test_copies_at_a_url(work: Path, tmp_path: Path) -> None:
    jobs = [{"source": str(work / "fts" / f"base-0{n}"), "output": f"out-{n}"} for n in range(2)]
    manifest = {"defaults": {"base": str(work / "base"), "rank": 2}, "jobs": jobs}
    for number in range(2):  # the second time from what is finished
        assert adapt_convert.batch(manifest, tmp_path / "local", copy_to=f"file://{tmp_path}/far-{number}")["exit_code"] == 0
        far = tmp_path / f"far-{number}"
        assert outputs(far) == outputs(tmp_path / "local")
        assert sorted(path.name for path in far.iterdir()) == ["batch.json", "index.html", "out-0", "out-1"]
    with pytest.raises(adapt_convert.AdaptError, match="--copy-to nosuch://x"):
        adapt_convert.batch(manifest, tmp_path / "other", copy_to="nosuch://x")
    far = tmp_path / "far?token=hidden"
    far.mkdir()
    for name in ("out-0", "out-1"):  # in the way of a directory to copy to
        (far / name).touch()
    failed = adapt_convert.batch(manifest, tmp_path / "third", copy_to=f"file://{far}")
    assert ["cannot be written" in row["error"] for row in failed["jobs"]] == [True, True]
    assert all("hidden" not in path.read_text(errors="replace") for path in (tmp_path / "third").rglob("*") if path.is_file())


def test_a_copy_that_fails_costs_no_conversion(work: Path, tmp_path: Path) -> None:
    jobs = [{"base": str(work / "base"), "source": str(work / "fts" / "base-00"), "rank": 2, "output": "out"}]
    far = tmp_path / "far"
    far.touch()
    failed = adapt_convert.batch({"jobs": jobs}, tmp_path / "local", copy_to=f"file://{far}", retry=1)
    assert failed["exit_code"] == 1
    assert "the summary was not copied" in failed["error"]
    assert json.loads((tmp_path / "local" / "batch.json").read_text()) == failed
    log = [json.loads(line)["event"] for line in (tmp_path / "local" / "batch.jsonl").read_text().splitlines()]
    assert (log.count("converting"), log.count("retrying"), log.count("failed")) == (1, 1, 1)
    far.unlink()
    assert adapt_convert.batch({"jobs": jobs}, tmp_path / "local", copy_to=f"file://{far}")["jobs"][0]["skipped"]
    assert outputs(far) == outputs(tmp_path / "local")


def test_until_a_copy_is_whole_it_has_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    for name in ("conversion.json", "weights"):
        (tmp_path / "made" / name).write_text("first")
    remote.copy_to(tmp_path / "made", ["conversion.json", "weights"], f"file://{tmp_path}/far")
    (tmp_path / "made" / "weights").unlink()
    with pytest.raises(adapt_convert.AdaptError):
        remote.copy_to(tmp_path / "made", ["conversion.json", "weights"], f"file://{tmp_path}/far")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["weights"]


@pytest.mark.parametrize(
    "url", ["nosuch://me:s%65cret@host/x?token=t0k", "ftp://me:s%65cret@127.0.0.1:1/x", "simplecache::nosuch://me:s%65cret@c"]
)
def test_credentials_in_a_url_are_not_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(adapt_convert.AdaptError) as refused:
        remote.copy_to(tmp_path, [], url)
    assert not any(secret in str(refused.value) for secret in ("s%65cret", "secret", "t0k", "me:"))
    assert "@" not in remote.shown(url)


WRITING = """
import tempfile
from pathlib import Path

def write_on():
    while True:
        (Path(tempfile.mkdtemp()) / "file").write_text("x")
"""
KILLED = """
import sys, tempfile
import writing
from adapt_convert.convert.batch.scheduler import LocalPool, Task

tempfile.tempdir = sys.argv[1]
pool = LocalPool(2, 2**40)
for future in [pool.submit(Task(writing.write_on, (), 0, print, print)) for _ in range(2)]:
    future.result()
"""


def test_processes_that_go_on_writing_leave_no_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "writing.py").write_text(WRITING)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(scratch)], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    while not any(scratch.glob("*/*/file")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    limit = time.monotonic() + 10
    while list(scratch.iterdir()) and time.monotonic() < limit:
        time.sleep(0.05)
    assert list(scratch.iterdir()) == []
