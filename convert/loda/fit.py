"""Fitting the map of one LoDA matrix to what the fine-tune's matrix makes of calibration activations.

The target is linear: with `T = W_ft - W`, `W` the weight that runs, the map should yield `y = T x`. What a layer-wise fit can gain
follows from that. Whatever f1 is, `B (z + f1(z))` lies in the span of B's r columns, so its mean squared error is at least that of
the projection of y onto this span, which `f1 = 0, A = (B^T B)^-1 B^T T` attains; and the best span is that of the leading r
principal directions of y. So the best LoDA of a layer is a LoRA: that of the plain SVD is replaced by these where they do better on
activations held out. f1 has something to gain only in the loss of the whole network, where refinement trains it. LoDA+ leaves the
span with f2 and is fitted here by Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, squared_norm
from adapt_convert.convert.svd import factorise
from adapt_convert.formats.loda import LodaMatrix
from adapt_convert.kernels.loda import loda_apply

STEPS = 300
_ROWS = 512  # activations in one step
_RATE = 3e-3
_WORTH = 1e-3  # share of the error by which a less simple map has to be better
_ROUNDING = 1e-9  # share of the energy below which a difference is one of rounding
_START = 0.1  # share of z that f1 is to begin with: at zero neither f1 nor f2 has a gradient
_TINY = 1e-30


@dataclass(frozen=True)
class Activations:
    """Inputs of one matrix, `(tokens, in)` float32: those it is fitted to and those that are held out to choose and to measure."""

    fit: Tensor
    heldout: Tensor


def error_of(matrix: LodaMatrix, target: Delta, x: Tensor) -> float:
    """`sum ||T x - f(x)||^2` over the rows of `x (n, in)`."""
    f1, f2 = matrix.f1, matrix.f2
    missed = target.matmul(x.T).T - loda_apply(x, matrix.A, matrix.B, f1, f2)
    return float(squared_norm(missed))


def energy_on(target: Delta, x: Tensor) -> float:
    """`sum ||T x||^2` over the rows of `x (n, in)`."""
    return float(squared_norm(target.matmul(x.T).T))


def plain_lora(target: Delta, rank: int, seed: int) -> LowRankDelta:
    """What `--to lora` makes of a change: its truncated SVD, which no activation has any part in."""
    return factorise(target, rank, torch.Generator().manual_seed(seed)).truncate(rank)


def projected_lora(target: Delta, x: Tensor, rank: int, seed: int) -> LowRankDelta:
    """The best rank-`rank` map of the rows of `x (n, in)` in the sense of `error_of`: `T` projected on the leading principal
    directions of its outputs. No other map whose outputs span as few dims, linear or not, comes closer."""
    outputs = factorise(DenseDelta(target.matmul(x.T).T.contiguous()), rank, torch.Generator().manual_seed(seed))
    directions = outputs.right[:rank]  # (r, out), orthonormal rows
    read = target.rmatmul(directions.T).T
    scale = torch.linalg.vector_norm(read, dim=1).clamp_min(_TINY).sqrt()
    return LowRankDelta(directions.T * scale, read / scale[:, None])


def best_lora(target: Delta, activations: Activations, rank: int, seed: int) -> LowRankDelta:
    """Of the plain and the projected map, the one that does better on the activations held out."""
    found = [plain_lora(target, rank, seed), projected_lora(target, activations.fit, rank, seed)]
    return min((f for f in found if f.rank), key=lambda f: error_of(LodaMatrix(f.A, f.B), target, activations.heldout))


def fit_plus(start: LowRankDelta, target: Delta, activations: Activations, seed: int) -> LodaMatrix:
    """A LoDA+ from `start` by Adam on `||T x - f(x)||^2`, all of its parts at once, in batches of the activations to be fitted.

    It may do worse than `start` on other activations: that is for the caller to find out.
    """
    draw = torch.Generator().manual_seed(seed)
    r, device = start.rank, start.A.device
    x, y = activations.fit, target.matmul(activations.fit.T).T
    unit = max(float(y.square().mean().sqrt()), _TINY)  # the loss is in units of the target, whatever its scale
    rotation = torch.linalg.qr(torch.randn(r, r, generator=draw)).Q.to(device)
    size = float((x[:_ROWS] @ start.A.T).square().mean().sqrt())  # of z; what comes out of f1's activation is of size 1
    parts = [start.A, start.B, rotation, _START * size * torch.eye(r, device=device), torch.zeros(start.shape[0], device=device)]
    # Adam's steps are as large for all parts: each is trained in units of the size that it has, or that it may come to have.
    scales = [float(start.A.square().mean().sqrt()), float(start.B.square().mean().sqrt()), r**-0.5, max(size, _TINY), unit]
    free = [(part / scale).requires_grad_() for part, scale in zip(parts, scales, strict=True)]

    def current() -> LodaMatrix:
        A, B, w_in, w_out, f2 = (part * scale for part, scale in zip(free, scales, strict=True))
        return LodaMatrix(A, B, (w_in, w_out), f2)

    def loss(rows: Tensor) -> Tensor:
        matrix = current()
        missed = loda_apply(x[rows], matrix.A, matrix.B, matrix.f1, matrix.f2) - y[rows]
        return (missed / unit).square().mean()

    _minimise(free, loss, len(x), draw)
    with torch.no_grad():
        return current()


def _minimise(parameters: list[Tensor], loss: Callable[[Tensor], Tensor], count: int, draw: torch.Generator) -> None:
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(count, (min(count, _ROWS),), generator=draw)
            optimiser.zero_grad()
            loss(rows).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            decay.step()


@dataclass(frozen=True)
class Found:
    """A map as it will be read back, how it was found, and its squared error on the activations held out."""

    kind: Literal["plain", "projected", "f1+f2"]
    matrix: LodaMatrix
    error: float


@dataclass(frozen=True)
class Fit:
    """The plain LoRA of a matrix, and the best map, which may be the same; `energy` is `sum ||T x||^2` on the activations held out."""

    plain: Found
    best: Found
    energy: float


def fit_matrix(target: Delta, activations: Activations, rank: int, plus: bool, dtype: torch.dtype, seed: int) -> Fit:
    """The best map of `target (out, in)` on activations held out: the plain LoRA, the projected one, or with `plus` a LoDA+.

    All three are rounded to `dtype` before they are measured, and the plain one is always among them: so the error is never above
    that of the LoRA of the same rank.
    """
    held = activations.heldout
    energy = energy_on(target, held)

    def found(kind: Literal["plain", "projected", "f1+f2"], matrix: LodaMatrix) -> Found:
        rounded = matrix.rounded(dtype).to(held.device)
        return Found(kind, rounded, error_of(rounded, target, held))

    plain, projected = plain_lora(target, rank, seed), projected_lora(target, activations.fit, rank, seed)
    choices = [found("plain", LodaMatrix(plain.A, plain.B)), found("projected", LodaMatrix(projected.A, projected.B))]
    if plus and min(choice.error for choice in choices) > _ROUNDING * energy:
        start = plain if choices[0].error <= choices[1].error else projected
        choices.append(found("f1+f2", fit_plus(start, target, activations, seed)))
    best = choices[0]
    for choice in choices:  # from the simplest on; NaN, of a fit that went astray, is never below
        if choice.error < best.error - max(_WORTH * best.error, _ROUNDING * energy):
            best = choice
    return Fit(choices[0], best, energy)
