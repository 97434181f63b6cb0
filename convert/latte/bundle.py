"""Several adapters of one base in one LatTE, over common bases, so that rows of one batch can be of different tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.convert.bundle_report import Bundled, bundle_report, names_apart, refuse_shared
from adapt_convert.convert.conversion import Conversion, survey, task_type
from adapt_convert.convert.latte.deltas import Effective
from adapt_convert.convert.latte.segments import find_segments
from adapt_convert.convert.latte.solver import describe, fingerprints, project, store_exact
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, make_plan, output_dtype, require_factors
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.report import Record
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, LatteTask


@dataclass
class _Task:
    """One adapter of the bundle: `stored` are its changed tensors that are no matrices, `records` those already decided."""

    plan: Plan
    effective: Effective
    stored: dict[Entry, float]
    records: list[Record]
    held: LatteTask


def bundle(
    base: str | Path,
    sources: Sequence[str | Path],
    *,
    progress: Progress = silent,
    **options: Any,
) -> Conversion:
    """Convert several fine-tunes or adapters of `base` into one LatTE; task k is the k-th source, from 1.

    `options` are the fields of `Options`; `rank` is the width of the common basis, so that adapters trained apart are exact only
    if it reaches the sum of their ranks. Raises `AdaptError`, also for changes that no row of a batch can have for itself: an
    embedding or a head.
    """
    started = time.monotonic()
    chosen = Options(**{"to": "latte", **options})
    if chosen.to != "latte":
        raise AdaptError(f"--to {chosen.to}: of bundles only --to latte and --to shared-lora can mix tasks in one batch")
    if chosen.construction == "score":
        raise AdaptError("--construction score: its wider heads belong to one task; a bundle takes --construction residual")
    if chosen.budget is not None:
        raise AdaptError("--budget: the tasks of a bundle share their bases; give --rank or --energy")
    if chosen.calib is not None:
        raise AdaptError("--calib: the tasks of a bundle share a basis and are not calibrated; calibrate each adapter by itself with delta")
    if not sources:
        raise AdaptError("a bundle needs at least one adapter")
    tasks = [_open(base, source, chosen, progress) for source in sources]
    refuse_shared({task.effective.pairs.source.origin: _unshared(task) for task in tasks}, chosen.exclude)
    for task, name in zip(tasks, names_apart([task.held.name for task in tasks]), strict=True):
        task.held.name = name
    first = tasks[0]
    segments, searched = find_segments([task.effective for task in tasks], chosen, progress)
    dtype = torch_dtype(output_dtype(chosen, first.effective.pairs.source))
    adapter = LatteAdapter(str(first.effective.pairs.base.config.get("model_type")), segments, [task.held for task in tasks])
    for task in tasks:
        task.records += project(task.effective, segments, task.held, dtype, progress)
        task.records += store_exact(task.effective, task.held, task.stored)
    adapter.fingerprints = fingerprints(first.effective)
    opened_base = first.effective.pairs.base
    adapter.base_model, adapter.task_type = opened_base.location.loadable, task_type(first.plan)
    records = [record for task in tasks for record in task.records]
    adapter.details = describe(adapter, searched)
    held = [Bundled(task.held.name, task.effective.pairs.source, task.plan, task.records) for task in tasks]
    report = bundle_report(opened_base, held, chosen) | {"latte": adapter.details}
    return Conversion(adapter, opened_base, first.plan, records, report, started)


def _open(base: str | Path, source: str | Path, options: Options, progress: Progress) -> _Task:
    opened_base, opened_source = open_pair(base, source)
    plan = make_plan(opened_base, opened_source, options)
    require_factors(plan, opened_base, options)
    pairs = Pairs(opened_base, opened_source, options.torch_device())
    effective = Effective(pairs, plan)
    stored, records = survey(pairs, plan, options, progress)
    return _Task(plan, effective, stored, records, LatteTask(opened_source.location.name))


def _unshared(task: _Task) -> list[Entry]:
    """What the source changes that is neither folded into its matrices nor held for each task."""
    per_row = task.effective.norms_by_task() | {"q_norm", "k_norm"}
    folded = task.effective.folded()
    return [e for e in task.stored if e.name not in folded and not {e.module, e.module.rpartition(".")[2]} & per_row]
