"""Several LoRAs (or fine-tunes) of one base over common subspaces: `D_i ~ U S_i V`, with U and V of each matrix stored once.

An adapter then costs a core of R x R numbers for each matrix in place of `r (out + in)`. Sources: Compress then Serve
(arXiv 2407.00066) and EigenLoRAx (arXiv 2502.04700). What each adapter keeps is measured on the factors as written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.bundle_report import Bundled, bundle_report, names_apart, refuse_shared
from adapt_convert.convert.conversion import Conversion, survey, task_type
from adapt_convert.convert.delta import Delta, LowRankDelta, residual_energy
from adapt_convert.convert.opening import open_base, open_source
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, make_plan, output_dtype, require_factors
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.report import Record, unchanged
from adapt_convert.convert.shared_lora.subspace import joint_subspaces
from adapt_convert.convert.side_by_side import DELTA_BYTES, side_by_side
from adapt_convert.convert.svd import factorise
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.shared_lora import SharedLoraAdapter, SharedTask, Subspaces

_SKETCH = 2  # a dense change enters the search for subspaces by its best approximation of so many times the rank


@dataclass(frozen=True)
class _Task:
    """One adapter: its matrices by module, the records of everything else, and what it changes that rows cannot have apart."""

    pairs: Pairs
    plan: Plan
    entries: dict[str, Entry]
    records: list[Record]
    unshared: list[Entry]


@dataclass(frozen=True)
class _Solved:
    """One module: its subspaces in the output dtype (None where no task changes it), and core, energy and residual by task."""

    subspaces: Subspaces | None
    cores: dict[int, Tensor]
    figures: dict[int, tuple[float, float]]


def bundle_loras(base: str | Path, sources: Sequence[str | Path], *, progress: Progress = silent, **options: Any) -> Conversion:
    """Convert several adapters or fine-tunes of `base` into one shared LoRA; task k is the k-th source, from 1.

    `options` are the fields of `Options`; `rank` is that of U and V, so that all adapters are exact where it reaches the sum of their
    ranks. Raises `AdaptError`, also for changes that are no matrices, which no row of a batch can have for itself.
    """
    started = time.monotonic()
    chosen = Options(to="lora", **options)
    if chosen.rank is None:
        raise AdaptError(f"--{'energy' if chosen.energy is not None else 'budget'}: a shared LoRA takes --rank, of U and V of every matrix")
    if not sources:
        raise AdaptError("a bundle needs at least one adapter")
    opened = open_base(base)
    tasks = [_open(opened, source, chosen, progress) for source in sources]
    factored = {module for task in tasks for module in task.entries}
    refuse_shared({task.pairs.source.origin: task.unshared for task in tasks}, chosen.exclude, factored)
    dtype = torch_dtype(output_dtype(chosen, tasks[0].pairs.source))
    names = names_apart([task.pairs.source.location.name for task in tasks])
    adapter = SharedLoraAdapter({}, [SharedTask(name) for name in names], opened.location.loadable, task_type(tasks[0].plan))
    _solve(tasks, adapter, chosen, dtype, progress)
    if not adapter.subspaces:
        raise AdaptError("none of the targeted matrices changed; there is nothing to factor")
    held = [Bundled(name, task.pairs.source, task.plan, task.records) for name, task in zip(names, tasks, strict=True)]
    report = bundle_report(opened, held, chosen)
    report |= {"target": "shared-lora", "options": report["options"] | {"to": "shared-lora"}}
    records = [record for task in tasks for record in task.records]
    return Conversion(adapter, opened, tasks[0].plan, records, report, started)


def _open(base: Checkpoint, origin: str | Path, options: Options, progress: Progress) -> _Task:
    source = open_source(base, origin)
    plan = make_plan(base, source, options)
    require_factors(plan, base, options)
    pairs = Pairs(base, source, options.torch_device())
    stored, records = survey(pairs, plan, options, progress)
    entries = {entry.module: entry for entry in plan.having("factor")}
    unshared = [entry for entry in (*stored, *entries.values()) if entry in stored or entry.kind != "matrix"]
    return _Task(pairs, plan, entries, records, unshared)


def _solve(tasks: Sequence[_Task], adapter: SharedLoraAdapter, options: Options, dtype: torch.dtype, progress: Progress) -> None:
    """Fill the adapter, and the records of the tasks, module by module."""
    modules = list(dict.fromkeys(module for task in tasks for module in task.entries))

    def size(module: str) -> int:
        return DELTA_BYTES * max(math.prod(task.entries[module].part.shape) for task in tasks if module in task.entries)

    def work(module: str, held: dict[int, _Task]) -> _Solved:
        return _solve_module({number: (task.pairs, task.entries[module]) for number, task in held.items()}, options, dtype)

    def load(module: str) -> dict[int, _Task]:
        return {number: task for number, task in enumerate(tasks) if module in task.entries}

    device = options.torch_device()
    for module, solved in side_by_side(progress(modules, "finding common subspaces"), size, load, work, device):
        if solved.subspaces is not None:
            adapter.subspaces[module] = solved.subspaces
        for number, (energy, residual) in solved.figures.items():
            task, entry = tasks[number], tasks[number].entries[module]
            if number in solved.cores:
                adapter.tasks[number].cores[module] = solved.cores[number]
            record = Record(entry, "factored", energy, residual, rank=options.rank) if energy > 0 else unchanged(entry)
            task.records.append(record)


def _solve_module(held: dict[int, tuple[Pairs, Entry]], options: Options, dtype: torch.dtype) -> _Solved:
    """Reads every task's change twice, so that one of them is in memory at a time: for the subspaces, then for its core."""
    assert options.rank is not None
    thin = {number: _thin(pairs.passing_delta(entry), options) for number, (pairs, entry) in held.items()}
    changed = [delta for delta in thin.values() if delta is not None]
    if not changed:
        return _Solved(None, {}, dict.fromkeys(held, (0.0, 0.0)))
    found = joint_subspaces(changed, options.rank)
    written = Subspaces(found.U.to("cpu", dtype), found.V.to("cpu", dtype))
    cores, figures = {}, {}
    for number, (pairs, entry) in held.items():
        if thin[number] is None:
            figures[number] = (0.0, 0.0)
            continue
        delta = pairs.passing_delta(entry)
        U, V = written.U.to(pairs.device).float(), written.V.to(pairs.device).float()
        core = (U.T @ delta.matmul(V.T)).to(dtype)
        if not torch.isfinite(core).all():
            raise AdaptError(f"{entry.name}: its core does not fit into {dtype}; choose --dtype bfloat16 or float32")
        cores[number] = core.cpu()
        figures[number] = (delta.energy(), residual_energy(delta, LowRankDelta(U @ core.float(), V)))
    return _Solved(written, cores, figures)


def _thin(delta: Delta, options: Options) -> LowRankDelta | None:
    """A change in factors, as the search for subspaces takes it; None where nothing changed."""
    if not delta.energy() > 0:
        return None
    if isinstance(delta, LowRankDelta):
        return delta
    rank = min(_SKETCH * (options.rank or 1), *delta.shape)
    return factorise(delta, rank, torch.Generator().manual_seed(options.seed)).truncate(rank)
