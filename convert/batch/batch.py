"""Many conversions over few bases: planned whole, resumable, each failure for itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapt_convert.convert.batch.checks import refuse_chains
from adapt_convert.convert.batch.inputs import find, foresee, is_done
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.manifest import parse_manifest, read_manifest
from adapt_convert.convert.batch.ray_pool import RayPool
from adapt_convert.convert.batch.run import FAILED, Events, Run
from adapt_convert.convert.batch.scheduler import LocalPool, Pool, available_memory, run_tasks
from adapt_convert.convert.batch.state import HIDDEN, INDEX, LOG, SUMMARY, JobState
from adapt_convert.convert.opening import open_base
from adapt_convert.convert.option_values import parse_size
from adapt_convert.formats import remote
from adapt_convert.formats.atomic import check_destination, write_text
from adapt_convert.formats.batch_html import batch_page
from adapt_convert.formats.errors import AdaptError

ENGINES = ("local", "ray")


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
    _check_options(jobs, retry, memory, engine, address)
    rows = read_manifest(manifest) if isinstance(manifest, str | Path) else parse_manifest(manifest)
    if not str(output):
        raise AdaptError("-o: an empty path; name a directory")
    root = Path(output)
    if copy_to:
        remote.check_url(copy_to, root)
    _check_outputs(root, rows)
    if dry_run:
        return {"jobs": [_foresee(root, job) for job in rows]}
    _check_login(rows)
    pool: Pool = RayPool(address, jobs) if engine == "ray" else LocalPool(jobs or 1, _limit(memory))
    # Closed also when the lock is refused; and before the lock is released, so that no process of this batch is left then.
    with contextlib.closing(pool), _locked(root), contextlib.closing(pool), (root / LOG).open("a", encoding="utf-8") as log:
        run = Run(root, rows, retry, copy_to, log, on_event)
        run.plan()
        run_tasks(run.queue, pool)
        summary = run.summary()
        _write(root, summary)
        if copy_to:
            _copy_summary(root, summary, copy_to)
    return summary


def _write(root: Path, summary: Mapping[str, Any]) -> None:
    write_text(root / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_text(root / INDEX, batch_page(summary))


def _copy_summary(root: Path, summary: dict[str, Any], url: str) -> None:
    """A copy that fails is said in the summary, and no reason to be without it."""
    try:
        remote.copy_to(root, [SUMMARY, INDEX], url)
    except AdaptError as error:
        summary |= {"exit_code": 1, "error": f"the summary was not copied: {error}"}
        _write(root, summary)


def _check_options(jobs: int | None, retry: int, memory: str | int | None, engine: str, address: str | None) -> None:
    if not isinstance(retry, int) or not isinstance(jobs, int | None) or (jobs is not None and jobs < 1) or retry < 0:
        raise AdaptError(f"--jobs {jobs}, --retry {retry}: must be whole numbers of at least 1 and 0")
    if engine not in ENGINES:
        raise AdaptError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    if engine == "ray" and memory is not None:
        raise AdaptError("--memory is an option of --engine local; Ray minds the memory of its cluster")
    if engine != "ray" and address is not None:
        raise AdaptError("--address is an option of --engine ray")


def _limit(memory: str | int | None) -> int:
    if memory is None:
        return available_memory()
    return parse_size(memory) if isinstance(memory, str) else memory


def _check_outputs(root: Path, jobs: list[Job]) -> None:
    """Refuse, before anything starts, what would replace somebody else's directory, or one that is read."""
    if root.exists() and not root.is_dir():
        raise AdaptError(f"{root} is not a directory; choose another with -o")
    for job in jobs:
        ours = JobState(root, job).read() is not None
        check_destination(root / job.output, ours or job.overwrite, (job.base, job.source))
    refuse_chains(root, jobs)


def _check_login(jobs: list[Job]) -> None:
    repo = next((job.push for job in jobs if job.push), None)
    if repo:
        from adapt_convert.formats.hub import check_login

        check_login(repo)


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


def _foresee(root: Path, job: Job) -> dict[str, Any]:
    """One row of the dry run."""
    row: dict[str, Any] = {"output": job.output, "base": job.base, "source": job.source, "to": job.options.to}
    try:
        found = find(job)
        if is_done(JobState(root, job), found):
            return row | {"status": "up to date"}
        if not job.overwrite:
            JobState(root, job).refuse_foreign()
        return row | {"status": "to convert", **foresee(found, open_base(job.base, job.base_revision)).to_json()}
    except AdaptError as error:
        return row | {"status": FAILED, "error": str(error)}
