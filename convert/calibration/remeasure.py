"""What an adapter that was changed after its solver holds of every matrix: the records of a report, measured again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from adapt_convert.convert.delta import Delta, residual_energy
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.latte.solver import approximation
from adapt_convert.convert.lorta.solver import measure as measure_lorta
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record
from adapt_convert.formats.latte import LatteAdapter, segment_of
from adapt_convert.formats.lorta import LortaAdapter
from adapt_convert.formats.peft import LoraAdapter


def remeasured(pairs: Pairs, plan: Plan, adapter: Any, records: list[Record], progress: Progress) -> list[Record]:
    """The same records, those of factored matrices with the energy that `adapter` misses now."""
    residuals = _MEASURES[type(adapter)](pairs, plan, adapter, progress)
    return [replace(record, residual=residuals.get(record.entry, record.residual)) for record in records]


def _lora(pairs: Pairs, plan: Plan, adapter: LoraAdapter, progress: Progress) -> dict[Entry, float]:
    held = {**adapter.factors, **adapter.embeddings}
    entries = [entry for entry in plan.having("factor") if entry.module in held]

    def work(entry: Entry, delta: Delta) -> float:
        factors = (adapter.embeddings if entry.kind == "embedding" else adapter.factors)[entry.module]
        return residual_energy(delta, factors.cast(torch.float32).to(pairs.device))

    return dict(pairs.each(progress(entries, "measuring"), work))


def _lorta(pairs: Pairs, plan: Plan, adapter: LortaAdapter, progress: Progress) -> dict[Entry, float]:
    return {record.entry: record.residual for record in measure_lorta(pairs, plan, adapter, progress)}


def _latte(pairs: Pairs, plan: Plan, adapter: LatteAdapter, progress: Progress) -> dict[Entry, float]:
    effective, task = Effective(pairs, plan), adapter.tasks[0]

    def work(matrix: Matrix, delta: Delta | None) -> float | None:
        block = (task.readers if matrix.reads else task.writers).get(matrix.module)
        if delta is None or block is None:
            return None
        segment = segment_of(adapter.segments, matrix.layer)
        return residual_energy(delta, approximation(block.to(pairs.device), segment.Q.to(pairs.device), matrix.reads))

    found = effective.each(effective.matrices, work, progress, "measuring")
    return {matrix.entry: residual for matrix, residual in found if matrix.entry is not None and residual is not None}


_MEASURES: dict[type, Any] = {LoraAdapter: _lora, LortaAdapter: _lorta, LatteAdapter: _latte}
