"""Joint principal subspaces of several changes of one matrix: common U and V with `D_i ~ U S_i V` for all i.

For fixed V the best U are the leading eigenvectors of `sum_i (D_i V^T)(D_i V^T)^T`, for fixed U the best V those of
`sum_i (U^T D_i)^T (U^T D_i)`, and the best `S_i` is `U^T D_i V^T`; each step can only raise what is captured. This is the joint
diagonalisation with full cores of Compress then Serve (arXiv 2407.00066), which is HOOI (De Lathauwer, De Moor and Vandewalle 2000) with
the mode of the tasks left whole; EigenLoRAx (arXiv 2502.04700) takes one side's principal subspace, which is where it starts here.
Changes in factors are reduced to small cores by a QR first, so no product is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.shared_lora import Subspaces

_SWEEPS = 50
_TOLERANCE = 1e-9  # share of what is captured that a sweep must add
_NOISE = 1e-13  # eigenvalues below this share of their sum are rounding


def joint_subspaces(deltas: Sequence[LowRankDelta], rank: int) -> Subspaces:
    """`U (out, a)` and `V (b, in)`, float32 and orthonormal, `a` and `b` at most `rank` and no larger than the deltas span.

    Each delta weighs alike, however large it is. Exact for all of them when `rank` reaches the sum of their ranks.
    """
    norms = [delta.energy() ** 0.5 for delta in deltas]
    left = torch.cat([delta.B.double() / norm for delta, norm in zip(deltas, norms, strict=True)], dim=1)
    right = torch.cat([delta.A.double() for delta in deltas])
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    cores, start = [], 0
    for delta in deltas:
        columns = slice(start, start + delta.rank)
        cores.append(r_left[:, columns] @ r_right[:, columns].T)
        start += delta.rank
    u, v = _of_cores(torch.stack(cores), rank)
    return Subspaces((q_left @ u).float(), (q_right @ v).T.float())


def _of_cores(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`u (m, a)` and `v (n, b)` for cores `(N, m, n)`, orthonormal columns, float64."""
    u, v = _leading(cores, rank), _leading(cores.mT, rank)
    captured = 0.0
    for _ in range(_SWEEPS):
        u = _leading(cores @ v, rank)
        v = _leading(cores.mT @ u, rank)
        before, captured = captured, float((u.T @ cores @ v).square().sum())
        if captured - before <= _TOLERANCE * captured:
            break
    return u, v


def _leading(stack: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of matrices `(N, m, n)` side by side, at most `rank` and none of rounding."""
    values, vectors = torch.linalg.eigh(torch.einsum("imk,ink->mn", stack, stack))
    kept = min(rank, max(1, int((values > _NOISE * values.sum()).sum())))
    leading: Tensor = vectors[:, -kept:].flip(1)
    return leading
