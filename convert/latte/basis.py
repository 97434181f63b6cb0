"""The basis of a segment: the R directions of the residual stream that hold most of the energy of its effective deltas.

The best one in Frobenius norm is closed form: the leading eigenvectors of
`G = sum_readers D^T D + sum_writers D D^T` (d, d), summed while the deltas stream by, so that no two of them are in memory.
Above `GRAM_LIMIT` the matrix itself takes more work than reading the deltas again, and G is only ever multiplied with thin blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import ROUGH_SHARE, Delta, DenseDelta

GRAM_LIMIT = 1536  # where the products of a Gram matrix take as long as the further passes
_OVERSAMPLING = 48  # a block of 64 columns takes hardly longer than one of 24
_PASSES = 12  # reads of all deltas, at most: as much work as a Gram matrix 4096 wide
_TOLERANCE = 5e-5  # share of captured energy that further passes may still be expected to add
_NOISE = 1e-13  # eigenvalues below this share of the sum are rounding, of factored deltas at least; that of dense ones may be larger

# Applied to a function of (reads the residual, delta): its results for every matrix of a segment, in order.
Stream = Callable[[Callable[[bool, Delta], Any]], Iterable[Any]]


def find_basis(stream: Stream, d: int, rank: int | None, energy: float | None, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `(d, R)` float32 and the eigenvalues that it captures, `(R,)` float64, largest first.

    R is `rank`, or the least that captures the share `energy`, but never more than the deltas span (and at least 1).
    """
    if d <= GRAM_LIMIT or rank is None or 4 * rank > d:
        values, vectors = _from_gram(gram(stream, d, device))
    else:
        values, vectors = _from_krylov(stream, d, rank, seed, device)
    total = float(values.clamp_min(0).sum())
    useful = int((values > _NOISE * total).sum())
    if energy is not None:
        rank = int((torch.cumsum(values, 0) < energy * total * (1 - 1e-12)).sum()) + 1
    assert rank is not None
    kept = max(1, min(rank, useful))
    basis = torch.linalg.qr(vectors[:, :kept].double()).Q  # orthonormal to float64 before the rounding to float32
    peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    return (basis * peak).float(), values[:kept]


def gram(stream: Stream, d: int, device: torch.device) -> Tensor:
    """`sum_readers D^T D + sum_writers D D^T`, `(d, d)` float64."""
    total = torch.zeros(d, d, dtype=torch.float64, device=device)
    for part in stream(lambda reads, delta: _own_gram(delta if reads else delta.T)):
        total += part
    return total


def _own_gram(delta: Delta) -> Tensor:
    """`D^T D`, `(in, in)`; of a factored delta in float64, so that its rank is told from rounding."""
    if isinstance(delta, DenseDelta):
        return delta.weight.T @ delta.weight
    B, A = delta.B.double(), delta.A.double()
    return A.T @ ((B.T @ B) @ A)


def _from_gram(total: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(total)
    return values.flip(0), vectors.flip(1)


def _from_krylov(stream: Stream, d: int, rank: int, seed: int, device: torch.device, rough: bool = True) -> tuple[Tensor, Tensor]:
    """Block Lanczos with full reorthogonalisation and a Rayleigh-Ritz step over all its blocks (Musco and Musco 2015, algorithm 2).

    `rough`: with products in bfloat16 where the processor is faster at them, unless the basis captures nearly everything.
    """
    generator = torch.Generator().manual_seed(seed)
    block = _orthonormal(torch.randn(d, rank + _OVERSAMPLING, generator=generator).to(device))
    basis, image = block[:, :0].double(), block[:, :0].double()
    captured, energy = [0.0, 0.0], 0.0
    while True:
        product = torch.zeros(block.shape, dtype=torch.float64, device=device)
        for part, own in stream(functools.partial(apply_gram, block, rough)):
            product += part
            energy += own if len(captured) == 2 else 0.0
        basis, image = torch.cat([basis, block.double()], dim=1), torch.cat([image, product], dim=1)
        projected = basis.T @ image
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        captured.append(float(values[-rank:].sum()))
        if rough and captured[-1] > ROUGH_SHARE * energy:
            return _from_krylov(stream, d, rank, seed, device, rough=False)
        if _settled(captured) or basis.shape[1] + block.shape[1] > min(d, _PASSES * block.shape[1]):
            return values.flip(0), (basis @ rotation).flip(1)
        for _ in range(2):  # once is not enough in floating point
            product = product - basis @ (basis.T @ product)
        block = _orthonormal(product).float()


def _settled(captured: list[float]) -> bool:
    """Whether gains that go on shrinking by the last factor add less than `_TOLERANCE`."""
    last, gain = captured[-2] - captured[-3], captured[-1] - captured[-2]
    ratio = gain / last if last > 0 else 1.0
    return captured[-1] == 0 or gain <= 0 or (ratio < 0.9 and gain * ratio / (1 - ratio) <= _TOLERANCE * captured[-1])


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def apply_gram(block: Tensor, rough: bool, reads: bool, delta: Delta) -> tuple[Tensor, float]:
    """One matrix's part of `G @ block`, `(d, k)` float32, and of the trace of G."""
    products = delta.rough() if rough else delta
    part = products.rmatmul(products.matmul(block)) if reads else products.matmul(products.rmatmul(block))
    return part, delta.energy()


def cut(layers: int, segments: int) -> list[range]:
    """The layers in `segments` runs of nearly equal length, in order."""
    bounds = [round(i * layers / segments) for i in range(segments + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
