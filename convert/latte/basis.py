"""The basis of a segment: the R directions of the residual stream that hold most of the energy of its effective deltas.

The best one in Frobenius norm is closed form: the leading eigenvectors of
`G = sum_readers D^T D + sum_writers D D^T` (d, d), summed while the deltas stream by, so that no two of them are in memory.
Where d is above `GRAM_LIMIT` and a rank is asked for that is small beside it, the matrix itself takes more work than reading the deltas
again, and G is only ever multiplied with thin blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import ROUGH_SHARE, Delta, DenseDelta
from adapt_convert.convert.latte.deltas import Matrix
from adapt_convert.convert.svd import factorise, orthonormal

GRAM_LIMIT = 1536  # where the products of a Gram matrix take as long as the further passes
_OVERSAMPLING = 48  # a block of 64 columns takes hardly longer than one of 24
_OWN = 16  # leading directions of each delta that the iteration starts from
_PASSES = 12  # reads of all deltas, at most: as much work as a Gram matrix 4096 wide
_TOLERANCE = 5e-5  # share of captured energy that further passes may still be expected to add
_NOISE = 1e-13  # eigenvalues below this share of the sum are rounding, of factored deltas at least; that of dense ones may be larger

# Applied to a function of (matrix, effective delta): its results for every changed matrix of a segment.
Stream = Callable[[Callable[[Matrix, Delta], Any]], Iterable[Any]]


def find_basis(
    stream: Stream, d: int, rank: int | None, energy: float | None, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, dict[Matrix, Tensor]]:
    """An orthonormal basis `(d, R)` float32 and the eigenvalues that it captures, `(R,)` float64, largest first.

    R is `rank`, or the least that captures the share `energy`, but never more than the deltas span (and at least 1). Third come the
    leading singular values of each delta, `(k,)` float64, where the search takes them.
    """
    if d <= GRAM_LIMIT or rank is None or 4 * rank > d:
        values, vectors = _from_gram(gram(stream, d, device))
        spectra: dict[Matrix, Tensor] = {}
    else:
        values, vectors, spectra = _from_krylov(stream, d, rank, seed, device)
    total = float(values.clamp_min(0).sum())
    useful = int((values > _NOISE * total).sum())
    if energy is not None:
        rank = int((torch.cumsum(values, 0) < energy * total * (1 - 1e-12)).sum()) + 1
    assert rank is not None
    kept = max(1, min(rank, useful))
    basis = orthonormal(vectors[:, :kept].double())  # orthonormal to float64 before the rounding to float32
    peak = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    return (basis * peak).float(), values[:kept], spectra


def gram(stream: Stream, d: int, device: torch.device) -> Tensor:
    """`sum_readers D^T D + sum_writers D D^T`, `(d, d)` float64."""
    total = torch.zeros(d, d, dtype=torch.float64, device=device)
    for part in stream(lambda matrix, delta: _own_gram(delta if matrix.reads else delta.T)):
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


def _from_krylov(stream: Stream, d: int, rank: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, dict[Matrix, Tensor]]:
    """Block Lanczos with full reorthogonalisation and a Rayleigh-Ritz step over all its blocks (Musco and Musco 2015, algorithm 2).

    It starts from the leading directions of the deltas' own truncated SVDs, which on a flat spectrum saves about half of the passes
    that a random start takes. Products are rough unless the basis captures nearly everything; where eigenvalues nearly tie, that can
    cost some 1e-4 of the captured energy.
    """
    generator = torch.Generator().manual_seed(seed)
    energy, rounded, spectra, own = 0.0, False, dict[Matrix, Tensor](), [torch.zeros(0, d, device=device)]
    for matrix, found in stream(functools.partial(_truncated, min(rank, _OWN), seed)):
        energy, rounded = energy + found.energy, rounded or found.rounded
        spectra[matrix] = found.values
        own.append(found.rows)
    start = _leading(torch.cat(own), rank + _OVERSAMPLING, generator)
    del own
    values, vectors = _iterate(stream, start, rank, rough=True)
    if rounded and float(values[:rank].sum()) > ROUGH_SHARE * energy:
        values, vectors = _iterate(stream, start, rank, rough=False)
    return values, vectors, spectra


def _iterate(stream: Stream, block: Tensor, rank: int, rough: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of G within the blocks that its powers make of the first one, `(d, k)` float32."""
    basis, image = block[:, :0].double(), block[:, :0].double()
    captured: list[float] = []
    while True:
        product = torch.zeros(block.shape, dtype=torch.float64, device=block.device)
        for part in stream(functools.partial(apply_gram, block, rough)):
            product += part
        basis, image = torch.cat([basis, block.double()], dim=1), torch.cat([image, product], dim=1)
        projected = basis.T @ image
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        captured.append(float(values[-rank:].sum()))
        if _settled(captured) or basis.shape[1] + block.shape[1] > min(len(basis), _PASSES * block.shape[1]):
            return values.flip(0), (basis @ rotation).flip(1)
        for _ in range(2):  # once is not enough in floating point
            product = product - basis @ (basis.T @ product)
        block = orthonormal(product).float()


def _settled(captured: list[float]) -> bool:
    """Whether the last pass added next to nothing, or gains that go on shrinking by the last factor add less than `_TOLERANCE`."""
    if len(captured) < 2:
        return captured[-1] == 0
    gain, enough = captured[-1] - captured[-2], _TOLERANCE * captured[-1]
    if gain <= 0.01 * enough:
        return True
    ratio = gain / (captured[-2] - captured[-3]) if len(captured) > 2 else 1.0
    return ratio < 0.9 and gain * ratio / (1 - ratio) <= enough


@dataclass(frozen=True)
class _Truncated:
    """Of one delta: its leading singular values `(k,)` float64, as many directions in the residual stream times them, `(k, d)`
    float32, its energy, and whether its products round."""

    values: Tensor
    rows: Tensor
    energy: float
    rounded: bool


def _truncated(rank: int, seed: int, matrix: Matrix, delta: Delta) -> tuple[Matrix, _Truncated]:
    found = factorise(delta, rank, torch.Generator().manual_seed(seed))
    values = found.values[:rank]
    rows = found.right[:rank] * values[:, None].float() if matrix.reads else found.left[:, :rank].T.contiguous()
    return matrix, _Truncated(values, rows, found.energy, delta.rounds)


def _leading(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` orthonormal columns `(d, count)`, float32: leading right singular vectors of rows `(n, d)`, filled up with random ones."""
    found = factorise(DenseDelta(rows), count, generator).right.T[:, :count] if len(rows) else rows.T
    others = torch.randn(len(found), count - found.shape[1], generator=generator).to(rows.device)
    return orthonormal(torch.cat([found, others], dim=1))


def apply_gram(block: Tensor, rough: bool, matrix: Matrix, delta: Delta) -> Tensor:
    """One matrix's part of `G @ block`, `(d, k)` float32."""
    products = delta.rough() if rough else delta
    return products.rmatmul(products.matmul(block)) if matrix.reads else products.matmul(products.rmatmul(block))


def cut(layers: int, segments: int) -> list[range]:
    """The layers in `segments` runs of nearly equal length, in order."""
    bounds = [round(i * layers / segments) for i in range(segments + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
