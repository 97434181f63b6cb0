"""The basis of a segment: the R directions of the residual stream that hold most of the energy of its effective deltas.

The best one in Frobenius norm is closed form: the leading eigenvectors of
`G = sum_readers D^T D + sum_writers D D^T` (d, d), summed while the deltas stream by, so that no two of them are in memory.
Above `GRAM_LIMIT` the matrix itself would be too large and G is only ever multiplied with a thin block (subspace iteration).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta

GRAM_LIMIT = 4096  # a Gram matrix of this width takes 134 MB in float64
_OVERSAMPLING = 16
_POWER_PASSES = 4  # reads of all deltas; the spectrum of a full fine-tune is nearly flat, and fewer lose energy
_NOISE = 1e-13  # eigenvalues below this share of the sum are the rounding of float32 deltas

Stream = Callable[[], Iterable[tuple[bool, Delta]]]  # (reads the residual, delta) for every matrix of a segment


def find_basis(stream: Stream, d: int, rank: int | None, energy: float | None, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `(d, R)` float32 and the eigenvalues that it captures, `(R,)` float64, largest first.

    R is `rank`, or the least that captures the share `energy`, but never more than the deltas span (and at least 1).
    """
    if d <= GRAM_LIMIT or rank is None or 4 * rank > d:
        values, vectors = _from_gram(gram(stream(), d, device))
    else:
        values, vectors = _from_iteration(stream, d, rank, seed, device)
    total = float(values.clamp_min(0).sum())
    useful = int((values > _NOISE * total).sum())
    if energy is not None:
        rank = int((torch.cumsum(values, 0) < energy * total * (1 - 1e-12)).sum()) + 1
    assert rank is not None
    kept = max(1, min(rank, useful))
    basis = torch.linalg.qr(vectors[:, :kept].double()).Q  # orthonormal to float64 before the rounding to float32
    peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    return (basis * peak).float(), values[:kept]


def gram(deltas: Iterable[tuple[bool, Delta]], d: int, device: torch.device) -> Tensor:
    """`sum_readers D^T D + sum_writers D D^T`, `(d, d)` float64."""
    total = torch.zeros(d, d, dtype=torch.float64, device=device)
    for reads, delta in deltas:
        total += _own_gram(delta if reads else delta.T)
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


def _from_iteration(stream: Stream, d: int, rank: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Subspace iteration with a Rayleigh-Ritz step at the end (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(d, min(d, rank + _OVERSAMPLING), generator=generator).to(device)
    basis = torch.linalg.qr(block).Q
    image = basis
    for _ in range(_POWER_PASSES):
        image = torch.zeros(d, basis.shape[1], dtype=torch.float64, device=device)
        for reads, delta in stream():
            image += apply_gram(reads, delta, basis)
        previous, basis = basis, torch.linalg.qr(image).Q.float()
    values, rotation = torch.linalg.eigh(previous.double().T @ image)
    return values.flip(0), (previous.double() @ rotation).flip(1)


def apply_gram(reads: bool, delta: Delta, block: Tensor) -> Tensor:
    """One matrix's part of `G @ block`, `(d, k)` float32."""
    return delta.rmatmul(delta.matmul(block)) if reads else delta.matmul(delta.rmatmul(block))


def cut(layers: int, segments: int) -> list[range]:
    """The layers in `segments` runs of nearly equal length, in order."""
    bounds = [round(i * layers / segments) for i in range(segments + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
