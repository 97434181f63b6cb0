"""The LoDA targets: a small map for every changed matrix, fitted to activations, and where asked for a cheaper weight under it.

LoDA: Low-Dimensional Adaptation of Large Language Models (MERL TR2025-130). docs/loda.md says what is the paper's and what is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.calibration.judge import Judge
from adapt_convert.convert.calibration.work import Solved, Work
from adapt_convert.convert.delta import Delta, LowRankDelta
from adapt_convert.convert.loda.activations import activations_of
from adapt_convert.convert.loda.fit import Activations, Fit, Found, energy_on, error_of, fit_matrix
from adapt_convert.convert.loda.macs import adapter_macs, lora_macs, weight_macs
from adapt_convert.convert.loda.replaced import is_replaced
from adapt_convert.convert.loda.replacement import replace_weight, target_of
from adapt_convert.convert.lora import lazy_value
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, output_dtype
from adapt_convert.convert.report import Record, exact, unchanged
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix


@dataclass(frozen=True)
class _Made:
    """One matrix: `energy` of its change, `seen` of that by the activations held out, the maps, and what replaces the weight."""

    entry: Entry
    energy: float
    seen: float
    fit: Fit
    base: LowRankDelta | None
    keep: Tensor | None


def solve_loda(judge: Judge, work: Work, options: Options) -> tuple[Solved, Solved]:
    """Two adapters: all maps as truncated SVDs, in which no text has a part, and every map the best on activations held out.

    What a weight is replaced by is the same in both; the changed tensors of `work.stored` are kept by value.
    """
    dtype = torch_dtype(output_dtype(options, work.pairs.source))
    records = [exact(entry, energy, entry.reason) for entry, energy in work.stored.items()]
    made = []
    for entry, activations in _watched(judge, work, work.plan.having("factor"), "fitting"):
        delta = work.pairs.delta(entry)
        if delta.energy():
            made.append(_solve(work.pairs, entry, delta, activations, options, dtype))
        else:
            records.append(unchanged(entry))
    _check_replaced(made, options)

    def solved(choose: Callable[[Fit], Found]) -> Solved:
        adapter = _adapter(work, made, options, dtype, choose)
        errors = {each.entry: choose(each.fit).error / each.seen for each in made}
        return adapter, records + [
            Record(m.entry, "factored", m.energy, m.energy * errors[m.entry], rank=choose(m.fit).matrix.rank) for m in made
        ]

    return solved(lambda fit: fit.plain), solved(lambda fit: fit.best)


def measured_again(judge: Judge, work: Work, adapter: LodaAdapter, records: list[Record]) -> list[Record]:
    """The records of an adapter that was changed after its solver, and in its `details` its errors and MACs as they are now."""
    pairs, before = work.pairs, adapter.details["matrices"]
    rows, errors = {}, {}
    entries = [entry for entry in work.plan.having("factor") if entry.module in adapter.matrices]
    for entry, activations in _watched(judge, work, entries, "measuring"):
        matrix, delta = adapter.matrices[entry.module], pairs.delta(entry)
        target = target_of(delta, _base_weight(pairs, entry), matrix.base, matrix.keep)
        error = error_of(matrix.to(pairs.device), target, activations.heldout)
        errors[entry] = error / _seen(delta, activations.heldout)
        rows[entry.module] = before[entry.module] | _row(matrix, "refined", errors[entry])
    adapter.details = adapter.details | _macs(adapter) | {"matrices": rows}
    return [replace(r, residual=r.energy * errors[r.entry]) if r.entry in errors else r for r in records]


def _watched(judge: Judge, work: Work, entries: Sequence[Entry], what: str) -> Iterator[tuple[Entry, Activations]]:
    steps = iter(work.progress(entries, what))
    for pair in activations_of(judge, entries):
        next(steps, None)
        yield pair


def _solve(pairs: Pairs, entry: Entry, delta: Delta, activations: Activations, options: Options, dtype: torch.dtype) -> _Made:
    """The maps of one matrix, on the base's weight or on what replaces it."""
    base, keep, target = None, None, delta
    if is_replaced(entry, options):
        weight = _base_weight(pairs, entry)
        base, keep = replace_weight(weight, activations, options, dtype)
        target = target_of(delta, weight, base, keep)
    assert options.rank is not None
    fit = fit_matrix(target, activations, options.rank, options.to.endswith("+"), dtype, options.seed)
    for factor in (fit.best.matrix.A, fit.best.matrix.B, *((base.A, base.B) if base else ())):
        if not torch.isfinite(factor).all():
            raise AdaptError(f"{entry.name}: its factors do not fit into {dtype}; choose --dtype bfloat16 or float32")
    return _Made(entry, delta.energy(), _seen(delta, activations.heldout), fit, base, keep)


def _base_weight(pairs: Pairs, entry: Entry) -> Tensor:
    """`(out, in)` float32."""
    assert entry.base_key is not None
    stored = pairs.base.read(entry.base_key).float().to(pairs.device)
    return stored.T.contiguous() if entry.transposed else stored


def _seen(delta: Delta, x: Tensor) -> float:
    """What errors are shares of; never zero, so that a change that no activation sees has none."""
    return energy_on(delta, x) or 1.0


def _adapter(work: Work, made: list[_Made], options: Options, dtype: torch.dtype, choose: Callable[[Fit], Found]) -> LodaAdapter:
    values = {entry.name: lazy_value(work.pairs, work.plan, entry.name) for entry in work.stored}
    adapter = LodaAdapter(options.to, {}, dtype, dict(values), options.base_rank, options.keep)
    rows = {}
    for each in made:
        found, module, cpu = choose(each.fit), each.entry.module, torch.device("cpu")
        matrix = replace(found.matrix.to(cpu), base=each.base.to(cpu) if each.base else None, keep=each.keep)
        adapter.matrices[module] = matrix
        errors = {"lora_error": each.fit.plain.error / each.seen, "least_error": each.fit.best.error / each.seen}
        rows[module] = _row(matrix, found.kind, found.error / each.seen) | errors
    adapter.details = {"variant": options.to, **_macs(adapter), "matrices": rows}
    return adapter


def _row(matrix: LodaMatrix, kind: str, error: float) -> dict[str, Any]:
    """A matrix in the report: how its map was made, its error as a share of the change on activations held out, and MACs."""
    row: dict[str, Any] = {"kind": kind, "error": error, "macs": weight_macs(matrix) + adapter_macs(matrix)}
    row |= {"base_rank": matrix.base.rank} if matrix.base is not None else {}
    return row | ({"kept_entries": int(matrix.keep.sum())} if matrix.keep is not None else {})


def _check_replaced(made: list[_Made], options: Options) -> None:
    if not made or (options.base_rank is None and options.keep is None) or any(m.base or m.keep is not None for m in made):
        return
    if options.base_rank is not None and any(is_replaced(m.entry, options) for m in made):
        raise AdaptError(f"--base-rank {options.base_rank}: saves nothing on any of the targeted matrices; give a lower one")
    raise AdaptError(f"--to {options.to}: none of the changed matrices is a q, k or v; name what to replace with --target-modules")


def _macs(adapter: LodaAdapter) -> dict[str, Any]:
    """Multiply-accumulates for one token through all adapted matrices."""
    matrices = adapter.matrices.values()
    return {
        "macs_per_token": sum(weight_macs(matrix) + adapter_macs(matrix) for matrix in matrices),
        "macs_per_token_of_base": sum(math.prod(matrix.shape) for matrix in matrices),
        "macs_per_token_of_lora": sum(lora_macs(matrix) for matrix in matrices),
    }
