"""The inputs of a job: where they are, what they are, and whether they are still what an earlier run has converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapt_convert.convert.architectures import vocabulary_of
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.state import Identity, JobState, files_of, settings_of
from adapt_convert.convert.opening import open_source, refuse_latte
from adapt_convert.convert.prediction import Prediction, predict
from adapt_convert.convert.preflight import make_plan, require_factors
from adapt_convert.convert.rank_for_budget import settle_budget
from adapt_convert.convert.validation.live_model import require_run_extra
from adapt_convert.convert.validation.texts import has_tokenizer
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.diffusion import refuse_diffusion
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, locate
from adapt_convert.formats.source import Source


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
    refuse_latte(source)
    if base.is_hub:
        job = replace(job, base=base.loadable, base_revision=base.revision)
    if source.is_hub:
        job = replace(job, source=source.loadable, revision=source.revision)
    return Found(job, base, source, (Identity.of(base), Identity.of(source)))


def foresee(found: Found, base: Checkpoint) -> Prediction:
    """What a job would write and take, from headers, the weights of a model that it runs among it.

    Raises `AdaptError` for a pair or options that cannot be converted.
    """
    if found.job.validate:
        _check_validation(found, base)
    found.job.options.require_text()
    source = open_source(base, found.job.source, found.job.revision)
    plan = make_plan(base, source, found.job.options)
    require_factors(plan, base, found.job.options)
    plan, options = settle_budget(plan, base, source, found.job.options)
    prediction = predict(plan, base, source, options)
    return replace(prediction, peak_memory=prediction.peak_memory + _model_bytes(found.job, base, source))


def _model_bytes(job: Job, base: Checkpoint, source: Source) -> int:
    """The weights of one model in memory: in float32 for `calib`, as the fine-tune is stored for `validate`, and 0 where none is run."""
    infos = source.store.infos if source.kind == "checkpoint" else base.infos
    if job.options.calib is not None:
        return 4 * sum(math.prod(info.shape) for info in infos.values())
    return sum(info.nbytes for info in infos.values()) if job.validate else 0


def _check_validation(found: Found, base: Checkpoint) -> None:
    """Refuse, before a conversion, a validation that would have nothing to run on, or nothing to run with."""
    require_run_extra()
    found.job.options.require_peft_form()
    refuse_diffusion(found.base)
    reads_text = vocabulary_of(base.config) is not None
    if reads_text and not (has_tokenizer(found.source) or has_tokenizer(found.base)):
        raise AdaptError(f"validate: {found.source.origin} and {found.base.origin} have no tokenizer; put its files into one of them")


def is_same(record: Mapping[str, Any], found: Found) -> bool:
    """Whether a record is of the same options, version and inputs."""
    if record.get("settings") != settings_of(found.job):
        return False
    pairs = zip((record["base"], record["source"]), found.identities, (found.base, found.source), strict=True)
    return all(Identity.from_json(old).is_still(now, location) for old, now, location in pairs)


def is_done(state: JobState, found: Found) -> bool:
    """Whether the output is there, made from the same options, version and inputs."""
    record = state.read()
    return record is not None and "result" in record and record["files"] == files_of(state.output) and is_same(record, found)
