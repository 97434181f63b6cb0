"""What the processes of a batch do: one tensor of a base for all fine-tunes that share it, and one job to its end.

Both are plain functions of plain values, so that any pool of processes can run them, on this machine or another one.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.state import JobState, files_of
from adapt_convert.convert.conversion import convert
from adapt_convert.convert.lora import prepare
from adapt_convert.convert.opening import open_base, open_source
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.pieces import Pieces
from adapt_convert.convert.preflight import Plan, make_plan
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError

PIECES, _MADE, _OLD = "pieces", "made", "old"


@dataclass(frozen=True)
class Group:
    """Jobs that share one reading of one base, in the directory `root` of the batch."""

    base: str
    base_revision: str | None
    jobs: tuple[Job, ...]
    root: Path


class _OneTensor(Checkpoint):
    """A base that keeps the tensor read last, for the next fine-tune to compare with."""

    _last: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read: not both in memory
            self._last = name, super().read(name)
        return self._last[1]

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        return iter(torch.split(self.read(name).reshape(-1), elements))


@lru_cache(maxsize=1)
def _open(group: Group) -> tuple[_OneTensor, dict[str, tuple[Job, Plan, Pairs]]]:
    """The base and all fine-tunes of a group, from headers. What cannot be opened is left to `finish`, which says why."""
    base = _OneTensor(open_base(group.base, group.base_revision).location)
    opened = {}
    for job in group.jobs:
        try:
            source = open_source(base, job.source, job.revision)
            plan = make_plan(base, source, job.options)
        except AdaptError:
            continue
        pieces = Pieces(JobState(group.root, job).directory / PIECES)
        opened[job.output] = (job, plan, Pairs(base, source, job.options.torch_device(), pieces))
    return base, opened


def share(group: Group, key: str) -> dict[str, Any]:
    """Read one tensor of the base and work out, for every job of the group, what it needs of it.

    A job that fails is left out here from then on: `finish` will meet the same failure and report it. Returns the tensor's
    BLAKE3 hash and how often it was read.
    """
    torch.set_num_threads(1)  # the same in every process and with any number of them: rounding depends on it
    base, opened = _open(group)
    before = base.store.reads
    for output, (job, plan, pairs) in list(opened.items()):
        try:
            for entry in plan.entries:
                if entry.base_key == key:
                    prepare(pairs, plan, entry, job.options)
        except Exception:  # whatever it is, it is this job's alone, and `finish` says so
            del opened[output]
    if not base.store.known([key]):
        base.read(key)
    return {"digests": base.store.known([key]), "reads": base.store.reads - before}


def finish(job: Job, root: Path, base_digests: dict[str, str]) -> dict[str, Any]:
    """Convert what is left of one job, publish its directory, and validate and push it if asked.

    Returns what the summary says of it. Raises `AdaptError` and nothing else: other exceptions may not survive the way to
    another process, so they become one, and their traceback is left in the job's hidden directory.
    """
    torch.set_num_threads(1)
    state = JobState(root, job)
    try:
        return _finish(job, state, base_digests)
    except AdaptError:
        raise
    except Exception as error:
        trace = state.directory / "traceback.txt"
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        raise AdaptError(f"{type(error).__name__}: {error} ({trace})") from None


def _finish(job: Job, state: JobState, base_digests: dict[str, str]) -> dict[str, Any]:
    _sweep(state.directory)
    pieces = Pieces(state.directory / PIECES, base_digests) if job.options.to == "lora" else None
    options = {name: value for name, value in job.options.as_given().items() if value is not None}
    conversion = convert(job.base, job.source, revision=job.revision, base_revision=job.base_revision, pieces=pieces, **options)
    conversion.save(state.directory / _MADE, measured=False)
    _publish(state)
    report = conversion.report
    result = {
        "captured_energy": report["captured_energy"],
        "bytes": report["bytes"],
        "weights": {role: report["inputs"][role]["blake3"] for role in ("base", "source")},
        "base_reads": conversion.base.store.reads,
        "passed": _validate(job, state.output) if job.validate else None,
        "files": files_of(state.output),
    }
    if job.push and result["passed"] is not False:
        from adapt_convert.formats.hub import push

        result["pushed"] = push(state.output, job.push)["url"]
    return result


def _sweep(directory: Path) -> None:
    """Remove what a killed process has left half written."""
    for path in directory.glob("*"):
        if path.is_dir() and path.name != PIECES:
            shutil.rmtree(path)


def _publish(state: JobState) -> None:
    """Rename the made directory to the output; an earlier output is out of the way for that moment only.

    What the record says is in the output is true whenever this process is killed: between the two names nothing is there.
    """
    state.output.parent.mkdir(parents=True, exist_ok=True)
    if state.output.exists():
        os.rename(state.output, state.directory / _OLD)
    record = state.read()
    assert record is not None  # written when the job was planned
    state.write(record | {"files": files_of(state.directory / _MADE)})
    os.rename(state.directory / _MADE, state.output)


def _validate(job: Job, output: Path) -> bool:
    """The verdict, with the report beside the adapter and in its card; untimed, as other jobs run beside it."""
    from adapt_convert.convert.validation.validate import validate

    base = f"{job.base}@{job.base_revision}" if job.base_revision else job.base
    source = f"{job.source}@{job.revision}" if job.revision else job.source
    result = validate(base, source, output, speed=False)
    result.save(output)
    result.save_html(output / "validation.html")
    result.update_cards()
    return result.passed
