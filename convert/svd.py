"""Truncated SVD of one delta, without ever taking a full SVD where a sketch will do.

By Eckart-Young the truncated SVD is the best rank-r approximation, so a data-free LoRA of a full fine-tune is
`D ~ U_r S_r V_r^T` (PHLoRA, arXiv 2509.10971). A block Krylov method (Musco and Musco, arXiv 1504.05477) reaches its energy to
1e-5 with a handful of thin products; the exact eigenvectors of the smaller Gram matrix take over where the wanted rank is no
longer small. `||D||_F^2` is known, and with it the error of either; without `exact` it is measured on the factors that are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.delta import ROUGH_SHARE, Delta, DenseDelta, LowRankDelta, RoughDelta

_OVERSAMPLING = 16  # extra columns of a Krylov block beyond the wanted rank: one step of a wider block costs less than a further step
_TOLERANCE = 1e-5  # share of captured energy that further Krylov steps may still be expected to add
_RATIO = 0.1  # of one step's gain to that of the last, at least: the first steps gain more than what they promise for the others
_KRYLOV_SHARE = 0.3  # of the matrix: where three blocks, the fewest that settle, are wider than that, the exact Gram matrix costs less
_DENSE_SHARE = 0.6  # of the matrix: a Krylov basis that has grown wider would settle no cheaper than the Gram matrix is had
_INDEPENDENT = 0.1  # of the largest eigenvalue of the Gram matrix of rows of unit length, at least
_NOISE = 1e-6  # singular values below this share of the largest are float32 rounding of the delta, not signal


@dataclass(frozen=True)
class Factorisation:
    """The leading singular triplets of one delta, largest first.

    `left (out, k)` and `right (k, in)` hold `D V` and `V^T` with orthonormal rows of `V^T`, so that `left[:, :r] @ right[:r]`
    is the projection of D on its leading r right singular vectors; `values (k,)` are float64 singular values.
    `energy` is `||D||_F^2`. One factorisation serves every rank up to k.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    energy: float

    def truncate(self, rank: int) -> LowRankDelta:
        """The best approximation of rank `rank`, or all that there is where that is less; the singular values are shared evenly, so that
        both factors have the same scale."""
        scale = self.values[:rank].sqrt().float()
        return LowRankDelta(self.left[:, :rank] / scale, self.right[:rank] * scale[:, None])


def factorise(delta: Delta, rank: int, generator: torch.Generator, exact: bool = True) -> Factorisation:
    """At least the leading `rank` singular triplets of `delta`, or all of its numerical rank if that is smaller.

    `generator` seeds the Krylov start on the CPU, so a seed means the same on every device. Without `exact`, values and left vectors may
    come from bfloat16 products (`DenseDelta.rough`): enough where only the right ones are used, and B is fitted to them (`fit_left`).
    """
    if isinstance(delta, LowRankDelta):
        return _from_factors(delta)
    small = min(delta.shape)
    rank = min(rank, small)
    block = rank + _OVERSAMPLING
    if 3 * block > _KRYLOV_SHARE * small:
        return _from_gram(delta, rank)
    return _from_krylov(delta, delta.rough(), rank, block, generator, exact) or _from_gram(delta, rank)


def factorise_for_energy(delta: Delta, share: float, generator: torch.Generator) -> tuple[Factorisation, int]:
    """A factorisation wide enough to capture `share` of the energy, and the smallest rank that does."""
    rank = 16
    while True:
        factorisation = factorise(delta, rank, generator)
        found = least_rank(factorisation.values, share * factorisation.energy * (1 - 1e-9))
        if found is not None:
            return factorisation, found
        if len(factorisation.values) < rank or rank >= min(delta.shape):  # all there is above rounding noise
            return factorisation, len(factorisation.values)
        # What is missing cannot come in singular values above the smallest found: that bounds the rank from below.
        missing = share * factorisation.energy - float(factorisation.values.square().sum())
        rank = max(2 * rank, rank + int(missing / float(factorisation.values[-1].square())))


def fit_left(delta: DenseDelta, start: LowRankDelta) -> tuple[Tensor, Tensor]:
    """The best `B (out, r)` for the `A (r, in)` of `start`, both float32, and the product `D A^T` that it comes from.

    It is the B of `start`, corrected where rows of A are independent: along others, errors of the product would be blown up.
    """
    product, rows = delta.matmul(start.A.T), start.A.double()
    gram = _small(rows.T, rows.T)
    scale = gram.diagonal().clamp_min(1e-300).sqrt()
    scales = torch.outer(scale, scale)
    inverse = torch.linalg.pinv(gram / scales, rtol=_INDEPENDENT, hermitian=True) / scales
    rest = product.double() - start.B.double() @ gram.to(product.device)
    return (start.B.double() + rest @ inverse.to(product.device)).float(), product


def least_rank(values: Tensor, energy: float) -> int | None:
    """How many of the singular values hold this energy; None when more of them are needed to tell."""
    enough = (torch.cumsum(values.square(), 0) >= energy).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _from_factors(delta: LowRankDelta) -> Factorisation:
    """Exact: QR of both factors and an SVD of the small core, in float64; the product is never formed."""
    q_b, r_b = torch.linalg.qr(delta.B.double())
    q_a, r_a = torch.linalg.qr(delta.A.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    u, vt = q_b @ u[:, : len(s)], vt[: len(s)] @ q_a.T
    return _finish(u * s, vt, s, float(s.square().sum()))


def _from_gram(delta: DenseDelta, rank: int) -> Factorisation:
    """Exact: eigenvectors of the smaller of `D^T D` and `D D^T`."""
    weight, tall = delta.weight, delta.shape[0] >= delta.shape[1]
    gram = (weight.T @ weight) if tall else (weight @ weight.T)
    vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)[:, :rank]
    if tall:
        left = weight @ vectors.float()
        return _finish(left, vectors.T, torch.linalg.vector_norm(left.double(), dim=0), delta.energy())
    right = weight.T @ vectors.float()  # D^T u = s v
    values = torch.linalg.vector_norm(right.double(), dim=0)
    return _finish(vectors * values, (right / values.clamp_min(1e-300)).T, values, delta.energy())


def _from_krylov(
    delta: DenseDelta, products: DenseDelta | RoughDelta, rank: int, block: int, generator: torch.Generator, exact: bool
) -> Factorisation | None:
    """Block Golub-Kahan-Lanczos with full reorthogonalisation; None when it does not settle in a narrow basis.

    Every step appends an orthonormal block to the basis V of the row space and keeps P = D V; the eigenvectors of the small
    P^T P are the best approximations within V (Rayleigh-Ritz) and its leading eigenvalues the energy captured so far, which
    only grows. Its gain shrinks by a nearly constant factor, which bounds what further steps can add. `products` stands for
    `delta` in all products but the last, which makes the result exact; without `exact` there, too.
    """
    start = torch.randn(delta.shape[0], block, generator=generator).to(delta.weight.device)
    basis = orthonormal(products.rmatmul(start))
    image = products.matmul(basis)
    gram = _small(image, image)
    captured, gain = 0.0, math.inf
    while True:
        previous, captured = captured, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if products is not delta and captured > ROUGH_SHARE * delta.energy():
            return _from_krylov(delta, delta, rank, block, generator, exact)
        last, gain = gain, captured - previous
        ratio = min(max(gain / last, _RATIO), 0.9) if 0 < last < math.inf else 1.0
        if captured == 0 or (ratio < 1 and gain < 0.01 * captured and gain * ratio / (1 - ratio) <= _TOLERANCE * captured):
            break
        if basis.shape[1] + block > _DENSE_SHARE * min(delta.shape):
            return None
        fresh = products.rmatmul(orthonormal(image[:, -block:]))
        for _ in range(2):  # once is not enough in float32
            fresh = orthonormal(fresh - basis @ (basis.T @ fresh))
        fresh_image = products.matmul(fresh)
        cross = _small(image, fresh_image)
        gram = torch.cat([torch.cat([gram, cross], dim=1), torch.cat([cross.T, _small(fresh_image, fresh_image)], dim=1)])
        basis, image = _beside(basis, fresh), _beside(image, fresh_image)
    if products is not delta:
        # More columns than asked for: of values that nearly tie, rounding chooses which come first.
        leading = torch.linalg.eigh(gram).eigenvectors[:, -block:].to(basis)
        basis = basis @ leading
        image = delta.matmul(basis) if exact else image @ leading
    return _from_ritz(basis, image, rank, delta.energy())


def _from_ritz(basis: Tensor, image: Tensor, rank: int, energy: float) -> Factorisation:
    """The best within orthonormal columns V of the row space, by their image D V."""
    image = image.double()
    rotation = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)[:, :rank]
    left, right = image @ rotation, (basis.double() @ rotation).T
    return _finish(left, right, torch.linalg.vector_norm(left, dim=0), energy)


def _small(left: Tensor, right: Tensor) -> Tensor:
    """`left^T right` of two blocks of columns, float64 and on the CPU, which decomposes small matrices in less time than a GPU."""
    return (left.T @ right).double().cpu()


def _beside(columns: Tensor, more: Tensor) -> Tensor:
    """Both, stored column after column: so they are copied as they lie, and products take them as they are."""
    return torch.cat([columns.T, more.T]).T


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `matrix (n, k)`, in its dtype."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def _finish(left: Tensor, right: Tensor, values: Tensor, energy: float) -> Factorisation:
    """Order by singular value, drop rounding noise, fix signs: the largest entry of each right vector is positive."""
    order = torch.argsort(values, descending=True, stable=True)
    order = order[values[order] > _NOISE * values.max()] if len(values) else order
    left, right, values = left[:, order], right[order], values[order]
    if len(values):
        peak = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).sign()
        left, right = left * peak.T, right * peak
    return Factorisation(left.float(), right.float(), values.double(), energy)
