"""The LatTE that errs least on real inputs: alternating least squares for the common basis and the blocks.

A reader behind the norm n adds `B Q^T n`, a writer `Q S z`, and what they should add is `D n` and `D z`. With `C = E[n n^T]` at each
norm and `C_z = E[z z^T]` the squared error of a segment is `sum_readers ||(D - B Q^T) C^1/2||^2 + sum_writers ||(D - Q S) C_z^1/2||^2`. For
a given Q (orthonormal) the best blocks are `B = D K` with `K = C Q (Q^T C Q)^-1` and `S = Q^T D`; for given blocks the best Q solves

    sum_norms C Q (K^T M K) + Q (Q0^T W Q0) = sum_norms C M K + W Q0,   M = sum D^T D of the readers behind a norm,  W = sum D C_z D^T,

so that the deltas are read once, for M and W. Each step lowers the error; the start is the basis of the data-free solver. Memory: `8 d^2`
bytes for each norm of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapt_convert.convert.calibration.least_squares import conjugate_gradients
from adapt_convert.convert.calibration.moments import FindMoments, Moments
from adapt_convert.convert.calibration.remeasure import remeasured
from adapt_convert.convert.calibration.work import Work
from adapt_convert.convert.delta import Delta, LowRankDelta
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.latte.solver import as_written, project
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record
from adapt_convert.convert.svd import orthonormal
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.latte import LatteAdapter, Segment

_ROUNDS = 20
_TOLERANCE = 1e-4  # share of the captured energy that a round must gain
_CG_STEPS = 20


def solve_whitened_latte(
    work: Work, find_moments: FindMoments, options: Options, first: tuple[LatteAdapter, list[Record]]
) -> tuple[LatteAdapter, list[Record]]:
    """The data-free solution `first` with bases and blocks fitted to the outputs; the records say what is held of the effective deltas."""
    pairs, plan, progress = work.pairs, work.plan, work.progress
    effective = Effective(pairs, plan)
    norms = tuple(dict.fromkeys(m.norm for m in effective.matrices if m.reads and m.norm))
    others = tuple(m.module for m in effective.matrices if not m.reads or not m.norm)
    moments = find_moments(others, dict.fromkeys(norms, effective.layout.norm))
    fits = [_fit(effective, segment, moments, progress) for segment in first[0].segments]
    dtype = torch_dtype(output_dtype(options, pairs.source))
    task = replace(first[0].tasks[0], readers={}, writers={}, biases={})
    adapter = replace(first[0], segments=[fit.segment for fit in fits], tasks=[task])
    project(effective, adapter.segments, task, dtype, progress)

    def block(matrix: Matrix, delta: Delta | None) -> Tensor | None:
        K = next(fit.readers for fit in fits if matrix.layer in fit.segment.layers).get(_site(matrix))
        return None if delta is None or K is None else as_written(delta.matmul(K.to(pairs.device)), dtype, matrix.module).cpu()

    readers = [matrix for matrix in effective.matrices if matrix.reads]
    for matrix, value in effective.each(readers, block, progress, "projecting on inputs"):
        if value is not None:
            task.readers[matrix.module] = value
    adapter.details = {name: value for name, value in adapter.details.items() if name != "lora_of_equal_energy"}
    return adapter, remeasured(pairs, plan, adapter, first[1], progress)


def _site(matrix: Matrix) -> str:
    """Where a reader's input comes from: the norm, or in post-norm encoders the matrix itself."""
    return matrix.norm or matrix.module


@dataclass(frozen=True)
class _Fit:
    """A segment with its basis, and `K (d, R)` for the readers of every site: `B = D K`."""

    segment: Segment
    readers: dict[str, Tensor]


@dataclass(frozen=True)
class _Grams:
    """`sites`: `(C, M)` of each norm, `(d, d)` float32; `W (d, d)` of the writers."""

    sites: dict[str, tuple[Tensor, Tensor]]
    W: Tensor

    def keys(self, Q: Tensor) -> dict[str, Tensor]:
        """`K = C Q (Q^T C Q)^-1` of every site."""
        return {site: _key(C, Q) for site, (C, _) in self.sites.items()}

    def captured(self, Q: Tensor, keys: dict[str, Tensor]) -> float:
        """The energy of the outputs that the best blocks for an orthonormal Q hold."""
        readers = sum(float((K * (M @ K @ (Q.T @ C @ Q))).sum()) for K, (C, M) in zip(keys.values(), self.sites.values(), strict=True))
        return readers + float((Q * (self.W @ Q)).sum())


def _key(C: Tensor, Q: Tensor) -> Tensor:
    CQ = (C @ Q).double()
    solution: Tensor = torch.linalg.solve(Q.double().T @ CQ, CQ, left=False)
    return solution.float()


def _fit(effective: Effective, segment: Segment, moments: Moments, progress: Progress) -> _Fit:
    grams = _grams(effective, segment, moments, progress)
    Q = segment.Q.to(effective.pairs.device)
    keys = grams.keys(Q)
    captured = grams.captured(Q, keys)
    for _ in range(_ROUNDS):
        trial = orthonormal(_better(grams, Q, keys).double()).float()
        trial_keys = grams.keys(trial)
        gain = grams.captured(trial, trial_keys) - captured
        if gain <= 0:
            break
        Q, keys, captured = trial, trial_keys, captured + gain
        if gain <= _TOLERANCE * captured:
            break
    return _Fit(replace(segment, Q=Q.cpu()), {site: K.cpu() for site, K in keys.items()})


def _grams(effective: Effective, segment: Segment, moments: Moments, progress: Progress) -> _Grams:
    device = effective.pairs.device

    def own(matrix: Matrix, delta: Delta | None) -> Tensor | None:
        if delta is None:
            return None
        if matrix.reads:
            return delta.rmatmul(delta.dense()) if not isinstance(delta, LowRankDelta) else delta.A.T @ (delta.B.T @ delta.B) @ delta.A
        DL = delta.matmul(moments.root(matrix.module).to(device))
        return DL @ DL.T

    matrices = [m for m in effective.matrices if m.layer in segment.layers]
    zero = torch.zeros(effective.width, effective.width, device=device)
    sums, W = dict[str, Tensor](), zero.clone()
    for matrix, part in effective.each(matrices, own, progress, "Gram matrices"):
        if part is not None and matrix.reads:
            sums[_site(matrix)] = sums.get(_site(matrix), zero) + part
        elif part is not None:
            W += part
    return _Grams({site: (moments.of(site).to(device), M) for site, M in sums.items()}, W)


def _better(grams: _Grams, Q: Tensor, keys: dict[str, Tensor]) -> Tensor:
    """The basis of least error for the blocks that are best for Q: conjugate gradients on its normal equations, from Q."""
    inner = {site: K.T @ M @ K for (site, K), (_, M) in zip(keys.items(), grams.sites.values(), strict=True)}
    target = grams.W @ Q
    outer = Q.T @ target
    for K, (C, M) in zip(keys.values(), grams.sites.values(), strict=True):
        target = target + C @ (M @ K)

    def apply(X: Tensor) -> Tensor:
        out = X @ outer
        for site, (C, _) in grams.sites.items():
            out = out + C @ X @ inner[site]
        return out

    return conjugate_gradients(apply, target, Q, _CG_STEPS)
