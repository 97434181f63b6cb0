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
from adapt_convert.convert.loda.fit import Activations, Fit, fit_matrix
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
        adapter.matrices[entry.module], fit = _solve(pairs, entry, delta, activations, options, dtype)
        record, rows[entry.module] = _measured(entry, delta, activations, adapter.matrices[entry.module], fit)
        records.append(record)
    _check_replaced(adapter, options)
    adapter.exact = {entry.name: lazy_value(pairs, plan, entry.name) for entry in stored}
    adapter.details = {"variant": options.to, **_macs(adapter), "matrices": rows}
    return adapter, records


def _solve(
    pairs: Pairs, entry: Entry, delta: Delta, activations: Activations, options: Options, dtype: torch.dtype
) -> tuple[LodaMatrix, Fit]:
    """The map of one matrix, on the base's weight or on what replaces it."""
    replacement = None
    target = delta
    if is_replaced(entry, options):
        weight = _base_weight(pairs, entry)
        replacement = replace_weight(weight, activations, options, dtype)
        target = target_of(delta, weight, replacement) if replacement else delta
    assert options.rank is not None
    fit = fit_matrix(target, activations, options.rank, options.to.endswith("+"), dtype, options.seed)
    matrix = fit.matrix.to(torch.device("cpu"))
    if not (torch.isfinite(matrix.A).all() and torch.isfinite(matrix.B).all()):
        raise AdaptError(f"{entry.name}: its factors do not fit into {dtype}; choose --dtype bfloat16 or float32")
    if replacement:
        base = replacement.base.to(torch.device("cpu")) if replacement.base else None
        matrix = replace(matrix, base=base, keep=replacement.keep)
    return matrix, fit


def _base_weight(pairs: Pairs, entry: Entry) -> Tensor:
    """`(out, in)` float32."""
    assert entry.base_key is not None
    stored = pairs.base.read(entry.base_key).float().to(pairs.device)
    return stored.T.contiguous() if entry.transposed else stored


def _measured(entry: Entry, delta: Delta, activations: Activations, matrix: LodaMatrix, fit: Fit) -> tuple[Record, dict[str, Any]]:
    """The record of a matrix and its row of the report. Errors are shares of `sum ||D x||^2` on the activations held out."""
    change = float(torch.linalg.vector_norm(delta.matmul(activations.heldout.T), dim=0).double().square().sum())
    error, of_lora = (value / change if change else 0.0 for value in (fit.error, fit.plain_error))
    row = {"kind": fit.kind, "error": error, "lora_error": of_lora, "macs": weight_macs(matrix) + adapter_macs(matrix)}
    if matrix.base is not None:
        row["base_rank"] = matrix.base.rank
    if matrix.keep is not None:
        row["kept_entries"] = int(matrix.keep.sum())
    return Record(entry, "factored", delta.energy(), delta.energy() * error, rank=matrix.rank), row


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
