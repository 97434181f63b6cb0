"""The inputs of a job: where they are, what they are, and whether they are still what an earlier run has converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapt_convert.convert.batch.manifest import Job
from adapt_convert.convert.batch.state import Identity, JobState, settings_of
from adapt_convert.convert.conversion import open_source
from adapt_convert.convert.prediction import predict
from adapt_convert.convert.preflight import make_plan, require_factors
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.location import Location, locate


@dataclass(frozen=True)
class Found:
    """The inputs of a job: where they are, and what they are. `job` names Hub models by their commit."""

    job: Job
    base: Location
    source: Location
    identities: tuple[Identity, Identity]


def find(job: Job) -> Found:
    """Locate both sides of a job. Raises `AdaptError`."""
    base, source = locate(job.base, job.base_revision), locate(job.source, job.revision)
    if base.is_hub:
        job = replace(job, base=base.loadable, base_revision=base.revision)
    if source.is_hub:
        job = replace(job, source=source.loadable, revision=source.revision)
    return Found(job, base, source, (Identity.of(base), Identity.of(source)))


def foresee(found: Found, base: Checkpoint) -> tuple[int, int]:
    """Predicted bytes and peak memory, from headers. Raises `AdaptError` for a pair or options that cannot be converted."""
    source = open_source(base, found.job.source, found.job.revision)
    plan = make_plan(base, source, found.job.options)
    require_factors(plan, base, found.job.options)
    return predict(plan, source, found.job.options)


def is_same(record: Mapping[str, Any], found: Found) -> bool:
    """Whether a record is of the same options, version and inputs."""
    if record.get("settings") != settings_of(found.job):
        return False
    pairs = zip((record["base"], record["source"]), found.identities, (found.base, found.source), strict=True)
    return all(Identity.from_json(old).is_still(now, location) for old, now, location in pairs)


def is_done(state: JobState, found: Found) -> bool:
    """Whether the output is there, made from the same options, version and inputs."""
    record = state.read()
    return record is not None and "result" in record and record["files"] == state.output_files() and is_same(record, found)
