"""One run of a batch: what is to do, in which order, and what became of it."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from adapt_convert.convert.batch.inputs import Found, find, foresee, is_done, is_same
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.scheduler import Task
from adapt_convert.convert.batch.state import Identity, JobState, settings_of
from adapt_convert.convert.batch.tasks import Group, finish, share
from adapt_convert.convert.opening import open_base
from adapt_convert.formats import remote
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError

CONVERTED, DIFFERS, FAILED = "converted", "failed validation", "failed"
_TOGETHER = 256  # jobs that share one reading of their base: the headers of their sources are in memory meanwhile
# Tensors of a base that were read: for the jobs that share one reading, and for those that read it for themselves.
_NO_READS = {"sharing_jobs": 0, "shared_reads": 0, "other_jobs": 0, "other_reads": 0}
Events = Callable[[dict[str, Any]], None]


def _on_gpu(job: Job) -> bool:
    return job.options.device is not None and job.options.device.startswith("cuda")


def _about(found: Found, weights: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """What a record says a job is made from; `weights` are the BLAKE3 hashes of both sides, by role, once they were read."""
    base, source = found.identities
    known = weights or {"base": None, "source": None}
    return {
        "settings": settings_of(found.job),
        "base": asdict(replace(base, weights=known["base"])),
        "source": asdict(replace(source, weights=known["source"])),
    }


@dataclass
class Run:
    """One run of a batch: what is to do, and what became of it. `results` are by output."""

    root: Path
    jobs: list[Job]
    retry: int
    copy_to: str | None
    log: TextIO
    on_event: Events
    queue: deque[Task] = field(default_factory=deque)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    bases: dict[tuple[str, str | None], dict[str, Any]] = field(default_factory=dict)

    def tell(self, event: str, **details: Any) -> None:
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.on_event(row)

    def plan(self) -> None:
        """Leave out what is done, forget what is stale, and queue the rest: together where jobs share a base."""
        self.tell("started", jobs=len(self.jobs))
        together: dict[tuple[str, str | None], list[tuple[Found, int]]] = {}
        opened: dict[tuple[str, str | None], Checkpoint] = {}
        for job in self.jobs:
            planned = self._plan_job(job, opened)
            if planned is None:
                continue
            found, peak = planned
            key = (found.job.base, found.job.base_revision)
            counts = self.bases.setdefault(key, {"base": job.base, "tensors": len(opened[key].infos), **_NO_READS})
            counts["sharing_jobs" if job.shares_its_base else "other_jobs"] += 1
            if job.shares_its_base:
                together.setdefault(key, []).append((found, peak))
            else:
                self.queue.append(self._finishing(found, peak, {}))
        for key, waiting in together.items():
            for start in range(0, len(waiting), _TOGETHER):
                self._queue_together(opened[key], waiting[start : start + _TOGETHER])

    def _plan_job(self, job: Job, opened: dict[tuple[str, str | None], Checkpoint]) -> tuple[Found, int] | None:
        """The inputs of a job and its predicted peak memory; None when it is done, or failed already."""
        state = JobState(self.root, job)
        for attempt in range(self.retry + 1):
            try:
                found = find(job)
                if is_done(state, found):
                    self._skip(job, state)
                    return None
                key = (found.job.base, found.job.base_revision)
                opened[key] = opened.get(key) or open_base(*key)
                peak = foresee(found, opened[key]).peak_memory
                self._begin(state, found)
                return found, peak
            except Exception as error:  # whatever it is, it is this job's alone
                if attempt < self.retry:
                    self.tell("retrying", job=job.output, error=str(error))
                else:
                    self._fail(job, error)
        return None

    def _begin(self, state: JobState, found: Found) -> None:
        """Take up what an interrupted run has left if it is of the same inputs and options; forget anything else but the output."""
        if not found.job.overwrite:
            state.refuse_foreign()
        record = state.read()
        if record is not None and not is_same(record, found):
            state.clean()
        state.write(_about(found) | {"files": record["files"] if record else {}})

    def _skip(self, job: Job, state: JobState) -> None:
        record = state.read()
        assert record is not None
        state.clean()  # a run that was killed right after the record has not come to it
        if self._deliver(job, state, record):
            self.results[job.output] = record["result"] | {"skipped": True}
            self.tell("skipped", job=job.output)

    def _deliver(self, job: Job, state: JobState, record: Mapping[str, Any]) -> bool:
        """Copy a finished output if that was not done yet, and say whether it is there; the conversion stays in any case."""
        if self.copy_to is None or record["copied_to"] == remote.shown(self.copy_to):
            return True
        for attempt in range(self.retry + 1):
            try:
                names = [path.name for path in state.output.iterdir() if path.is_file()]
                remote.copy_to(state.output, names, self.copy_to, job.output)
                state.write({**record, "copied_to": remote.shown(self.copy_to)})
                return True
            except (AdaptError, OSError) as error:
                if attempt < self.retry:
                    self.tell("retrying", job=job.output, error=str(error))
                else:
                    self._fail(job, error)
        return False

    def _queue_together(self, base: Checkpoint, waiting: list[tuple[Found, int]]) -> None:
        """One task for each tensor of the base; after the last one the jobs are finished one by one."""
        jobs = tuple(found.job for found, _ in waiting)
        group = Group(jobs[0].base, jobs[0].base_revision, jobs, self.root)
        digests: dict[str, str] = {}
        left = set(base.infos)

        def settle(key: str, result: Mapping[str, Any] | None) -> None:
            if result is not None:
                digests.update(result["digests"])
                self.bases[group.base, group.base_revision]["shared_reads"] += result["reads"]
            left.discard(key)
            self.tell("shared", base=group.base, tensor=key, left=len(left))
            if not left:
                # Before the next group: pieces are as large as the adapters, and go when those are done.
                self.queue.extendleft(self._finishing(found, peak, digests) for found, peak in reversed(waiting))

        peak = max(peak for _, peak in waiting)
        for key in base.infos:
            # A process that dies here is not the end of the jobs: they find no piece and make it themselves.
            self.queue.append(
                Task(
                    share,
                    (group, key),
                    peak,
                    lambda result, key=key: settle(key, result),  # type: ignore[misc]
                    lambda error, key=key: settle(key, None),  # type: ignore[misc]
                    gpu=any(map(_on_gpu, jobs)),
                )
            )

    def _finishing(self, found: Found, peak: int, digests: dict[str, str]) -> Task:
        """The task that ends a job; it goes back into the queue while it may be tried again."""
        job, state = found.job, JobState(self.root, found.job)
        attempts, since = 0, time.monotonic()

        def start() -> None:
            nonlocal attempts, since
            attempts, since = attempts + 1, time.monotonic()
            self.tell("converting", job=job.output)

        def done(result: dict[str, Any]) -> None:
            reads = "shared_reads" if job.shares_its_base else "other_reads"
            self.bases[job.base, job.base_revision][reads] += result.pop("base_reads")
            weights, files = result.pop("weights"), result.pop("files")
            result["status"] = DIFFERS if result["passed"] is False else CONVERTED
            record = _about(found, weights) | {"files": files, "result": result, "copied_to": None}
            try:
                if (Identity.of(found.base), Identity.of(found.source)) != found.identities:
                    raise AdaptError("an input was changed while it was read")
                state.write(record)  # before the copy, whose failure is none of the conversion
                state.clean()
            except (AdaptError, OSError) as error:
                failed(error)
                return
            if self._deliver(job, state, record):
                self.results[job.output] = result
                self.tell(result["status"], job=job.output, seconds=round(time.monotonic() - since, 3))

        def failed(error: BaseException) -> None:
            if attempts and attempts <= self.retry:
                self.tell("retrying", job=job.output, error=str(error))
                self.queue.append(task)
            else:
                self._fail(job, error)

        task = Task(finish, (job, self.root, digests), peak, done, failed, start, _on_gpu(job))
        return task

    def _fail(self, job: Job, error: BaseException) -> None:
        message = str(error if isinstance(error, AdaptError) else AdaptError(f"{type(error).__name__}: {error}"))
        self.results[job.output] = {"status": FAILED, "error": message}
        self.tell(FAILED, job=job.output, error=message)

    def summary(self) -> dict[str, Any]:
        rows = []
        for job in self.jobs:
            about = {"output": job.output, "base": job.base, "source": job.source, "to": job.options.to, "validated": job.validate}
            rows.append(about | {"skipped": False} | self.results[job.output])
        counts = Counter(row["status"] for row in rows)
        code = 1 if counts[FAILED] else 3 if counts[DIFFERS] else 0
        self.tell("ended", exit_code=code, counts=dict(counts))
        return {"exit_code": code, "counts": dict(counts), "bases": list(self.bases.values()), "jobs": rows}
