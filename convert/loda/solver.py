"""The LoDA targets: a small map for every changed matrix, fitted to activations, and where asked for a cheaper weight under it.

LoDA: Low-Dimensional Adaptation of Large Language Models (MERL TR2025-130). docs/loda.md says what is the paper's and what is ours.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.calibration.judge import Judge
from adapt_convert.convert.delta import Delta
from adapt_convert.convert.loda.activations import activations_of
from adapt_convert.convert.loda.fit import Activations, Fit, error_of, fit_matrix
from adapt_convert.convert.loda.macs import adapter_macs, lora_macs, weight_macs
from adapt_convert.convert.loda.replacement import is_replaced, replace_weight, target_of
from adapt_convert.convert.lora import lazy_value
from adapt_convert.convert.options import DTYPES, Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record, exact, unchanged
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix


def solve_loda(
    judge: Judge, pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[LodaAdapter, list[Record]]:
    """Fit a map for each matrix of the plan to what the fine-tune reads on the judge's text; the changed tensors of `stored` are kept
    by value."""
    dtype = DTYPES[options.dtype or output_dtype(pairs.source)]
    adapter = LodaAdapter(options.to, {}, dtype, base_rank=options.base_rank, keep=options.keep)
    records = [exact(entry, energy, entry.reason) for entry, energy in stored.items()]
    rows: dict[str, dict[str, Any]] = {}
    entries = plan.having("factor")
    steps = iter(progress(entries, "fitting"))
    for entry, activations in activations_of(judge, entries):
        next(steps, None)
        delta = pairs.delta(entry)
        if delta.energy() == 0:
            records.append(unchanged(entry))
            continue
        matrix, fit = _solve(pairs, entry, delta, activations, options, dtype)
        adapter.matrices[entry.module] = matrix
        change = _energy(delta, activations.heldout)
        rows[entry.module] = _row(matrix, fit.kind, fit.error / change, fit.plain_error / change)
        records.append(Record(entry, "factored", delta.energy(), delta.energy() * fit.error / change, rank=matrix.rank))
    _check_replaced(adapter, options)
    adapter.exact = {entry.name: lazy_value(pairs, plan, entry.name) for entry in stored}
    adapter.details = {"variant": options.to, **_macs(adapter), "matrices": rows}
    return adapter, records


def measured_again(judge: Judge, pairs: Pairs, plan: Plan, adapter: LodaAdapter, records: list[Record], progress: Progress) -> list[Record]:
    """The records of an adapter that was changed after its solver, and in its `details` its errors and MACs as they are now."""
    before, rows, errors = adapter.details["matrices"], {}, {}
    entries = [entry for entry in plan.having("factor") if entry.module in adapter.matrices]
    steps = iter(progress(entries, "measuring"))
    for entry, activations in activations_of(judge, entries):
        next(steps, None)
        matrix, delta = adapter.matrices[entry.module], pairs.delta(entry)
        target = target_of(delta, _base_weight(pairs, entry), matrix.base, matrix.keep)
        error = error_of(matrix.to(pairs.device), target, activations.heldout)
        errors[entry] = error / _energy(delta, activations.heldout)
        rows[entry.module] = _row(matrix, "refined", errors[entry], before[entry.module]["lora_error"])
    adapter.details = adapter.details | _macs(adapter) | {"matrices": rows}
    return [replace(r, residual=r.energy * errors[r.entry]) if r.entry in errors else r for r in records]


def _solve(
    pairs: Pairs, entry: Entry, delta: Delta, activations: Activations, options: Options, dtype: torch.dtype
) -> tuple[LodaMatrix, Fit]:
    """The map of one matrix, on the base's weight or on what replaces it."""
    base, keep, target = None, None, delta
    if is_replaced(entry, options):
        weight = _base_weight(pairs, entry)
        base, keep = replace_weight(weight, activations, options, dtype)
        target = target_of(delta, weight, base, keep)
    assert options.rank is not None
    fit = fit_matrix(target, activations, options.rank, options.to.endswith("+"), dtype, options.seed)
    cpu = torch.device("cpu")
    matrix = replace(fit.matrix.to(cpu), base=base.to(cpu) if base else None, keep=keep)
    if not all(torch.isfinite(factor).all() for factor in (matrix.A, matrix.B, *((matrix.base.A, matrix.base.B) if matrix.base else ()))):
        raise AdaptError(f"{entry.name}: its factors do not fit into {dtype}; choose --dtype bfloat16 or float32")
    return matrix, fit


def _base_weight(pairs: Pairs, entry: Entry) -> Tensor:
    """`(out, in)` float32."""
    assert entry.base_key is not None
    stored = pairs.base.read(entry.base_key).float().to(pairs.device)
    return stored.T.contiguous() if entry.transposed else stored


def _energy(delta: Delta, x: Tensor) -> float:
    """`sum ||D x||^2` over the rows of x: what errors are shares of. Never zero, so that a change that no activation sees has none."""
    found = float(torch.linalg.vector_norm(delta.matmul(x.T), dim=0).double().square().sum())
    return found or 1.0


def _row(matrix: LodaMatrix, kind: str, error: float, lora_error: float) -> dict[str, Any]:
    """A matrix in the report: how its map was made, errors as shares of the change on activations held out, and MACs."""
    row = {"kind": kind, "error": error, "lora_error": lora_error, "macs": weight_macs(matrix) + adapter_macs(matrix)}
    row |= {"base_rank": matrix.base.rank} if matrix.base is not None else {}
    return row | ({"kept_entries": int(matrix.keep.sum())} if matrix.keep is not None else {})


def _check_replaced(adapter: LodaAdapter, options: Options) -> None:
    replaced = any(matrix.base is not None or matrix.keep is not None for matrix in adapter.matrices.values())
    if not adapter.matrices or replaced or (options.base_rank is None and options.keep is None):
        return
    if options.base_rank is not None:
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
