"""What only all jobs of a manifest together can tell: outputs and repositories that are impossible, or taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.state import INDEX, LOG, SUMMARY
from adapt_convert.formats.errors import AdaptError

_NAME = "{name} in it stands for the source's name"


def output_problems(jobs: list[Job]) -> Iterator[str]:
    """Outputs that are no directories below that of the batch, or that are, or hold, those of other jobs or of the batch."""
    taken: dict[str, Job] = {}
    for job in jobs:
        parts = PurePosixPath(job.output).parts
        if not job.output.isprintable():
            yield f"{job.output}: the output of {job.source} has to be a name that can be printed"
        elif PurePosixPath(job.output).is_absolute() or not parts or any(part.startswith(".") for part in parts):
            yield f"{job.output}: the output of {job.source} has to be a directory below that of the batch"
        elif parts[0] in (SUMMARY, LOG, INDEX):
            yield f"{job.output}: the output of {job.source} has the name of a file that the batch itself writes"
        elif job.output in taken:
            both = f"{taken[job.output].source} and {job.source}"
            yield f"{job.output}: is the output of both {both}; give each an `output` of its own ({_NAME})"
        taken[job.output] = job
    for job in jobs:
        for parent in PurePosixPath(job.output).parents:
            if str(parent) in taken:
                yield f"{job.output}: lies in the output of {taken[str(parent)].source}"


def push_problems(jobs: list[Job]) -> Iterator[str]:
    """Repositories with a name that the Hub would not take, or that two jobs would publish to, one over the other."""
    taken: dict[str, Job] = {}
    for job in jobs:
        if job.push is None:
            continue
        from adapt_convert.formats.hub import check_repo

        try:
            check_repo(job.push)
        except AdaptError as error:
            yield f"push: {error}"
        same = job.push.lower()  # the Hub tells no names apart by case
        if same in taken:
            yield f"push: {job.push}: both {taken[same].source} and {job.source} would go there; give each a `push` of its own ({_NAME})"
        taken[same] = job


def refuse_chains(root: Path, jobs: list[Job]) -> None:
    """Refuse a job that reads what another one writes: which of the two comes first is not decided. Raises `AdaptError`."""
    made = {(root / job.output).resolve(): job for job in jobs}
    for job in jobs:
        for read in (Path(job.base).expanduser(), Path(job.source).expanduser()):
            writer = next((made[path] for path in (read.resolve(), *read.resolve().parents) if path in made), None)
            if writer is not None and writer is not job and read.exists():
                raise AdaptError(f"{job.output}: reads {read}, the output of another job; convert it in a batch of its own")
