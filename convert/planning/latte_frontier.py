"""LatTEs that could be written: one basis search for each number of segments serves every width.

The columns of a basis are orthonormal and come in the order of what they capture, so the narrower LatTE is the leading columns, and
`||D Q||_F^2`, column by column, is exactly what each matrix keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.latte.segments import find_segments
from adapt_convert.convert.latte.solver import store_exact
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.planning.candidates import Candidate, candidate
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record, unchanged
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment, segment_of

RANKS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class _Kept:
    """Of one effective delta: its energy, what each column of its segment's basis holds of it `(R,)` float64, and its bias."""

    energy: float
    by_column: Tensor
    bias: Tensor | None


def latte_frontier(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], rest: Sequence[Record], progress: Progress
) -> Iterator[Candidate]:
    """Widths of `RANKS` for one segment, about the square root of the layers, and one for each layer.

    A post-norm encoder has a basis for each layer in any case.
    """
    effective = Effective(pairs, plan)
    ranks = [rank for rank in RANKS if rank <= effective.width] or [effective.width]
    layers = effective.layers
    for count in [layers] if effective.layout.post_norms else sorted({1, math.isqrt(layers), layers}):
        segments, _ = find_segments([effective], options.changed(rank=ranks[-1], segments=count), progress)
        kept = _measure(effective, segments, progress)
        if not any(own.energy > 0 for own in kept.values()):
            return
        for rank in ranks:
            task = LatteTask(pairs.source.location.name)
            narrow = [replace(segment, Q=segment.Q[:, :rank]) for segment in segments]
            adapter = LatteAdapter(str(pairs.base.config.get("model_type")), narrow, [task])
            records = _fill(effective, adapter, kept, torch_dtype(output_dtype(options, pairs.source)))
            records += store_exact(effective, task, stored)
            yield candidate(f"--rank {rank} --segments {count}", options, adapter, records, rest)


def _measure(effective: Effective, segments: list[Segment], progress: Progress) -> dict[Matrix, _Kept]:
    def work(matrix: Matrix, delta: Delta | None) -> _Kept:
        bias = effective.bias(matrix)
        if delta is None or not (energy := delta.energy()) > 0:
            return _Kept(0.0, torch.zeros(0, dtype=torch.float64), bias)
        Q = segment_of(segments, matrix.layer).Q.to(effective.pairs.device)
        block = delta.matmul(Q) if matrix.reads else delta.rmatmul(Q)
        return _Kept(energy, torch.linalg.vector_norm(block, dim=0).double().square().cpu(), bias)

    return dict(effective.each(effective.matrices, work, progress, f"projecting on {len(segments)} bases"))


def _fill(effective: Effective, adapter: LatteAdapter, kept: dict[Matrix, _Kept], dtype: torch.dtype) -> list[Record]:
    """Give the adapter's task blocks of the right shapes, without numbers, and record what they would hold."""
    task, records = adapter.tasks[0], []
    for matrix, own in kept.items():
        if own.bias is not None:
            task.biases[matrix.module] = own.bias
        rank = segment_of(adapter.segments, matrix.layer).rank
        if own.energy > 0:
            rows, columns = effective.shape(matrix)
            held, shape = (task.readers, (rows, rank)) if matrix.reads else (task.writers, (rank, columns))
            held[matrix.module] = torch.empty(shape, dtype=dtype, device="meta")
        if matrix.entry is not None:
            residual = max(0.0, own.energy - float(own.by_column[:rank].sum()))
            records.append(Record(matrix.entry, "factored", own.energy, residual) if own.energy > 0 else unchanged(matrix.entry))
    return records
