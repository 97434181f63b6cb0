"""Many conversions over few bases: planned whole, resumable, each failure for itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from adapt_convert.convert.batch_state import HIDDEN, Identity, JobState, settings_of, write_whole
from adapt_convert.convert.batch_tasks import Group, finish, share
from adapt_convert.convert.conversion import open_base, open_source
from adapt_convert.convert.manifest import Job, parse_manifest, read_manifest
from adapt_convert.convert.options import parse_size
from adapt_convert.convert.prediction import predict
from adapt_convert.convert.preflight import make_plan, require_factors
from adapt_convert.convert.ray_pool import RayPool
from adapt_convert.convert.scheduler import LocalPool, Pool, Task, available_memory, run_tasks
from adapt_convert.formats import remote
from adapt_convert.formats.atomic import check_destination
from adapt_convert.formats.batch_html import batch_page
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, locate

ENGINES = ("local", "ray")
SUMMARY, LOG, INDEX = "batch.json", "batch.jsonl", "index.html"
CONVERTED, DIFFERS, FAILED = "converted", "failed validation", "failed"
_TOGETHER = 256  # jobs that share one reading of their base: the headers of their sources are in memory meanwhile
# Tensors of a base that were read: for the jobs that share one reading, and for those that read it for themselves.
_NO_READS = {"sharing_jobs": 0, "shared_reads": 0, "other_jobs": 0, "other_reads": 0}
Events = Callable[[dict[str, Any]], None]


def batch(
    manifest: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    jobs: int | None = None,
    retry: int = 0,
    dry_run: bool = False,
    memory: str | int | None = None,
    engine: str = "local",
    address: str | None = None,
    copy_to: str | None = None,
    on_event: Events = lambda event: None,
) -> dict[str, Any]:
    """Run the conversions of a manifest (docs/batch.md), a file or its content, into directories below `output`.

    `jobs` is the number of processes (1), `retry` how often a failed job is tried again, `memory` (bytes, or text like 20GB)
    what all processes together may use by prediction: what the machine has to spare by default. With `engine="ray"` the
    processes are workers of the Ray cluster at `address`, as many as it has CPUs, and Ray minds their memory. Finished outputs
    are copied below the URL `copy_to` as well. What an earlier run finished from the same inputs, options and version is left
    as it is. `on_event` is told what also goes into `batch.jsonl`.

    Returns what `batch.json` holds, or with `dry_run` the plan of every job. Raises `AdaptError` when the manifest or the
    output is refused; a job that fails is a row of the result.
    """
    if (jobs is not None and jobs < 1) or retry < 0:
        raise AdaptError(f"--jobs {jobs}, --retry {retry}: must be whole numbers of at least 1 and 0")
    if engine not in ENGINES:
        raise AdaptError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    if copy_to:
        remote.check_url(copy_to)
    rows = read_manifest(manifest) if isinstance(manifest, str | Path) else parse_manifest(manifest)
    limit = parse_size(memory) if isinstance(memory, str) else memory
    root = Path(output)
    _check_outputs(root, rows)
    if dry_run:
        return {"jobs": [_foresee(root, job) for job in rows]}
    _check_pushes(rows)
    with _locked(root), (root / LOG).open("a", encoding="utf-8") as log:
        run = _Run(root, rows, retry, copy_to, log, on_event)
        pool: Pool = RayPool(address, jobs) if engine == "ray" else LocalPool(jobs or 1, limit or available_memory())
        try:
            run.plan()
            run_tasks(run.queue, pool)
        finally:
            pool.close()
        summary = run.summary()
        write_whole(root / SUMMARY, json.dumps(summary, indent=1) + "\n")
        write_whole(root / INDEX, batch_page(summary))
    if copy_to:
        remote.copy_to(root, [SUMMARY, INDEX], copy_to)
    return summary


def _check_outputs(root: Path, jobs: list[Job]) -> None:
    """Refuse, before anything starts, what would replace somebody else's directory, or one that is read."""
    if root.exists() and not root.is_dir():
        raise AdaptError(f"{root} is not a directory; choose another with -o")
    for job in jobs:
        ours = JobState(root, job).read() is not None
        check_destination(root / job.output, ours or job.overwrite, (job.base, job.source))


def _check_pushes(jobs: list[Job]) -> None:
    repos = [job.push for job in jobs if job.push]
    if repos:
        from adapt_convert.formats.hub import check_login, check_repo

        for repo in repos:
            check_repo(repo)
        check_login(repos[0])


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One batch at a time in a directory; the lock ends with the process, however it ends."""
    try:
        (root / HIDDEN).mkdir(parents=True, exist_ok=True)
        with (root / HIDDEN / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AdaptError(f"{root}: another batch is running there") from None
            yield
    except OSError as error:
        raise AdaptError(f"{root}: cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Found:
    """The inputs of a job: where they are, and what they are. `job` names Hub models by their commit."""

    job: Job
    base: Location
    source: Location
    identities: tuple[Identity, Identity]


def _find(job: Job) -> _Found:
    base, source = locate(job.base, job.base_revision), locate(job.source, job.revision)
    if base.is_hub:
        job = replace(job, base=base.loadable, base_revision=base.revision)
    if source.is_hub:
        job = replace(job, source=source.loadable, revision=source.revision)
    return _Found(job, base, source, (Identity.of(base), Identity.of(source)))


def _foresee(root: Path, job: Job) -> dict[str, Any]:
    """One row of the dry run."""
    row: dict[str, Any] = {"output": job.output, "base": job.base, "source": job.source, "to": job.options.to}
    try:
        found = _find(job)
        if _is_done(JobState(root, job), found):
            return row | {"status": "up to date"}
        size, peak = _predict(found, open_base(job.base, job.base_revision))
        return row | {"status": "to convert", "predicted_bytes": size, "predicted_peak_memory": peak}
    except AdaptError as error:
        return row | {"status": FAILED, "error": str(error)}


def _predict(found: _Found, base: Checkpoint) -> tuple[int, int]:
    source = open_source(base, found.job.source, found.job.revision)
    plan = make_plan(base, source, found.job.options)
    require_factors(plan, base, found.job.options)
    return predict(plan, source, found.job.options)


def _is_same(record: Mapping[str, Any], found: _Found) -> bool:
    """Whether a record is of the same options, version and inputs."""
    if record.get("settings") != settings_of(found.job):
        return False
    pairs = zip((record["base"], record["source"]), found.identities, (found.base, found.source), strict=True)
    return all(Identity.from_json(old).is_still(now, location) for old, now, location in pairs)


def _is_done(state: JobState, found: _Found) -> bool:
    record = state.read()
    return record is not None and "result" in record and record["files"] == state.output_files() and _is_same(record, found)


def _on_gpu(job: Job) -> bool:
    return job.options.device is not None and job.options.device.startswith("cuda")


@dataclass
class _Run:
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
        together: dict[tuple[str, str | None], list[tuple[_Found, int]]] = {}
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

    def _plan_job(self, job: Job, opened: dict[tuple[str, str | None], Checkpoint]) -> tuple[_Found, int] | None:
        """The inputs of a job and its predicted peak memory; None when it is done, or failed already."""
        state = JobState(self.root, job)
        for attempt in range(self.retry + 1):
            try:
                found = _find(job)
                if _is_done(state, found):
                    self._skip(job, state)
                    return None
                key = (found.job.base, found.job.base_revision)
                opened[key] = opened.get(key) or open_base(*key)
                peak = _predict(found, opened[key])[1]
                self._begin(state, found)
                return found, peak
            except AdaptError as error:
                if attempt < self.retry:
                    self.tell("retrying", job=job.output, error=str(error))
                else:
                    self._fail(job, str(error))
        return None

    def _begin(self, state: JobState, found: _Found) -> None:
        """Take up what an interrupted run has left if it is of the same inputs and options; forget anything else."""
        record = state.read()
        if record is not None and not _is_same(record, found):
            state.restart()
        base, source = found.identities
        state.write({"settings": settings_of(found.job), "base": asdict(base), "source": asdict(source)})

    def _skip(self, job: Job, state: JobState) -> None:
        record = state.read()
        assert record is not None
        if record.get("copied_to") != self.copy_to:
            self._copy(job, state)
            state.write(record | {"copied_to": self.copy_to})
        self.results[job.output] = record["result"] | {"skipped": True}
        self.tell("skipped", job=job.output)

    def _copy(self, job: Job, state: JobState) -> None:
        if self.copy_to:
            names = [path.name for path in state.output.iterdir() if path.is_file()]
            remote.copy_to(state.output, names, f"{self.copy_to.rstrip('/')}/{job.output}")

    def _queue_together(self, base: Checkpoint, waiting: list[tuple[_Found, int]]) -> None:
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
                self.queue.extend(self._finishing(found, peak, digests) for found, peak in waiting)

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

    def _finishing(self, found: _Found, peak: int, digests: dict[str, str]) -> Task:
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
            if (Identity.of(found.base), Identity.of(found.source)) != found.identities:
                failed(AdaptError("an input was changed while it was read"))
                return
            try:
                self._copy(job, state)
            except AdaptError as error:
                failed(error)
                return
            weights = result.pop("weights")
            status = DIFFERS if result["passed"] is False else CONVERTED
            self.results[job.output] = result | {"status": status}
            base, source = (replace(i, weights=weights[r]) for i, r in zip(found.identities, ("base", "source"), strict=True))
            state.write(
                {"settings": settings_of(job), "base": asdict(base), "source": asdict(source)}
                | {"files": state.output_files(), "result": self.results[job.output], "copied_to": self.copy_to}
            )
            state.clean()
            self.tell(status, job=job.output, seconds=round(time.monotonic() - since, 3))

        def failed(error: BaseException) -> None:
            message = str(error if isinstance(error, AdaptError) else AdaptError(f"{type(error).__name__}: {error}"))
            if attempts <= self.retry and attempts:
                self.tell("retrying", job=job.output, error=message)
                self.queue.append(task)
            else:
                trace = {} if isinstance(error, AdaptError) else {"traceback": traceback.format_exception(error)}
                self._fail(job, message, **trace)

        task = Task(finish, (job, self.root, digests), peak, done, failed, start, _on_gpu(job))
        return task

    def _fail(self, job: Job, message: str, **details: Any) -> None:
        self.results[job.output] = {"status": FAILED, "error": message}
        self.tell(FAILED, job=job.output, error=message, **details)

    def summary(self) -> dict[str, Any]:
        rows = []
        for job in self.jobs:
            about = {"output": job.output, "base": job.base, "source": job.source, "to": job.options.to, "validated": job.validate}
            rows.append(about | {"skipped": False} | self.results[job.output])
        counts = Counter(row["status"] for row in rows)
        code = 1 if counts[FAILED] else 3 if counts[DIFFERS] else 0
        self.tell("ended", exit_code=code, counts=dict(counts))
        return {"exit_code": code, "counts": dict(counts), "bases": list(self.bases.values()), "jobs": rows}
