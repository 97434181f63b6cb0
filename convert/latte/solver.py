"""The LatTE target: a common basis of the residual stream for every matrix of a run of layers, and what each matrix does in it.

Every reader's effective delta is projected on the basis from its input side, `D ~ (D Q) Q^T`, every writer's from its output side,
`D ~ Q (Q^T D)`. Then the residual stream can carry the adapter's part in R extra dims and each weight, expanded by the two blocks,
stays one matrix product (kernels/latte.py). Exact where all deltas lie in the span of Q.
Paper: LatTE, "Efficient fine-tuning via auxiliary representation"; the residual-stream construction is this project's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, inner_product, residual_energy
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.latte.score_solver import solve_scores
from adapt_convert.convert.latte.segments import find_segments
from adapt_convert.convert.lora import lazy_value
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record, exact, unchanged
from adapt_convert.convert.side_by_side import side_by_side
from adapt_convert.convert.svd import factorise, least_rank
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment, fingerprint, segment_of

FOLDED = "folded into the effective deltas and biases of the matrices that read it"


def solve_latte(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[LatteAdapter, list[Record]]:
    """Find the bases, project every matrix, and keep the other changed tensors of `stored` (entry -> energy) by value."""
    if options.construction == "score":
        return solve_scores(pairs, plan, options, stored, progress)
    effective = Effective(pairs, plan)
    segments, searched = find_segments([effective], options, progress)
    dtype = torch_dtype(output_dtype(options, pairs.source))
    task = LatteTask(pairs.source.location.name)
    adapter = LatteAdapter(str(pairs.base.config.get("model_type")), segments, [task])
    compared: list[tuple[int, int]] = []
    records = project(effective, segments, task, dtype, progress, compared)
    if not task.readers and not task.writers:
        raise AdaptError(f"{pairs.source.origin}: none of the targeted matrices changed; there is nothing to factor")
    records += store_exact(effective, task, stored)
    adapter.fingerprints = fingerprints(effective)
    adapter.details = describe(adapter, searched) | {"lora_of_equal_energy": lora_of_equal_energy(compared)}
    return adapter, records


def describe(adapter: LatteAdapter, searched: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a LatTE beside its tensors: how many numbers it adds, its segments, and what was searched."""
    segments = [{"layers": [s.start, s.stop], "rank": s.rank} for s in adapter.segments]
    described: dict[str, Any] = {"parameters": adapter.parameters(), "segments": segments}
    return described | ({"searched": searched} if searched else {})


def lora_of_equal_energy(compared: list[tuple[int, int]]) -> dict[str, Any]:
    """Size of the LoRA that captures of every effective delta what this LatTE does, from each one's `(rank, out + in)`.

    They are the least ranks, by truncated SVD, and never exceed the LatTE's rank, which projects every delta on that many dims.
    """
    ranks = [rank for rank, _ in compared]
    numbers = sum(rank * sides for rank, sides in compared)
    return {"parameters": numbers, "mean_rank": sum(ranks) / max(1, len(ranks)), "largest_rank": max(ranks, default=0)}


def project(
    effective: Effective,
    segments: list[Segment],
    task: LatteTask,
    dtype: torch.dtype,
    progress: Progress,
    compared: list[tuple[int, int]] | None = None,
) -> list[Record]:
    """Fill a task with the projections of all effective deltas and with the biases; measure what the written blocks miss.

    To `compared`, where it is given, goes `(rank, out + in)` of the LoRA of equal energy for every changed matrix.
    """

    def work(matrix: Matrix, delta: Delta | None) -> tuple[Tensor | None, float, float, Tensor | None, int]:
        segment = segment_of(segments, matrix.layer)
        Q = segment.Q.to(effective.pairs.device)
        bias = effective.bias(matrix)
        if delta is None or not (energy := delta.energy()) > 0:
            return None, 0.0, 0.0, bias, segment.rank
        product = delta.matmul(Q) if matrix.reads else delta.rmatmul(Q).T
        block = as_written(product, dtype, matrix.module)
        inner = inner_product(product, block) if isinstance(delta, DenseDelta) else None
        residual = residual_energy(delta, approximation(block, Q, matrix.reads), inner)
        if compared is not None:
            ranks[matrix] = _lora_rank(effective, matrix, delta, segment.rank, energy - residual)
        return block.cpu(), energy, residual, bias, segment.rank

    records, ranks = [], dict[Matrix, int]()
    found = dict(effective.each(effective.matrices, work, progress, "projecting"))
    for matrix in effective.matrices:
        block, energy, residual, bias, rank = found[matrix]
        if block is not None:
            (task.readers if matrix.reads else task.writers)[matrix.module] = block
        if bias is not None:
            task.biases[matrix.module] = bias.cpu()
        records += _record(matrix, energy, residual, rank)
    if compared is not None:
        compared += [(ranks[m], sum(effective.shape(m))) for m in effective.matrices if m in ranks and m.entry is not None]
    return records


def _lora_rank(effective: Effective, matrix: Matrix, delta: Delta, most: int, captured: float) -> int:
    """The least rank, at most `most`, at which a truncated SVD captures this energy."""
    enough = captured * (1 - 1e-6)
    known = least_rank(effective.spectra[matrix], enough) if matrix in effective.spectra else None
    return known or least_rank(factorise(delta, most, torch.Generator().manual_seed(0)).values, enough) or most


def approximation(block: Tensor, Q: Tensor, reads: bool) -> LowRankDelta:
    """The delta that a written block stands for."""
    return LowRankDelta(block.float(), Q.T) if reads else LowRankDelta(Q, block.float())


def _record(matrix: Matrix, energy: float, residual: float, rank: int) -> list[Record]:
    """Energies are those of the effective delta. A matrix that only meets a changed norm gain has no row in the plan."""
    if matrix.entry is None:
        return []
    reason = "energy of the effective delta, norm gain folded in" if matrix.reads else ""
    return [Record(matrix.entry, "factored", energy, residual, reason, rank) if energy > 0 else unchanged(matrix.entry)]


def as_written(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A block in the output dtype. Raises `AdaptError` when it does not fit."""
    written = block.to(dtype)
    if not torch.isfinite(written).all():
        raise AdaptError(f"{name}: its block does not fit into {dtype}; choose --dtype bfloat16 or float32")
    return written.contiguous()


def store_exact(effective: Effective, task: LatteTask, stored: dict[Entry, float]) -> list[Record]:
    """Changed tensors that are no matrices: those that the effective deltas contain are folded, the others kept whole."""
    folded = effective.folded()
    records = []
    for entry, energy in stored.items():
        if entry.name in folded and entry.name.endswith(".bias"):
            records.append(exact(entry, energy, "as the bias of an expanded matrix"))
        elif entry.name in folded:
            records.append(Record(entry, "factored", 0.0, 0.0, FOLDED))
        else:
            task.exact[entry.name] = lazy_value(effective.pairs, effective.plan, entry.name)
            records.append(exact(entry, energy, entry.reason))
    return records


def fingerprints(effective: Effective) -> dict[str, dict[str, str]]:
    """Of every expanded matrix of the base, by module."""
    base, keys = effective.pairs.base, effective.plan.base_keys

    def read(matrix: Matrix) -> Tensor:
        return base.read(keys[f"{matrix.module}.weight"])

    def work(matrix: Matrix, weight: Tensor) -> dict[str, str]:
        return fingerprint(weight, weight.dtype)

    found = side_by_side(effective.matrices, lambda m: 4 * math.prod(effective.shape(m)), read, work, torch.device("cpu"))
    return {matrix.module: hashes for matrix, hashes in found}
