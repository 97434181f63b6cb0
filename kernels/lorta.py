"""The forward pass of one slice of a LoRTA, never forming the slice."""

from __future__ import annotations

from torch import Tensor


def lorta_apply(x: Tensor, A: Tensor, B: Tensor, heads: Tensor, reads: bool) -> Tensor:
    """`x @ D^T` for the slice `D` of a LoRTA, by way of its rank.

    `A (d, r)` is the residual side, `B (d_h, r)` the head side and `heads (H, r)` is `C_H * C_L[l] * C_M[m]`. Where the matrix
    `reads` the residual stream, `x` is `(..., d)` and the result `(..., H d_h)`; where it writes to it, the other way round.
    LoRTA (arXiv 2410.04060), equation 3 and the remark on the output projection.
    """
    if reads:
        inner = (x @ A).unsqueeze(-2) * heads  # (..., H, r)
        return (inner @ B.T).flatten(-2)
    split = x.reshape(*x.shape[:-1], heads.shape[0], B.shape[0])
    inner = ((split @ B) * heads).sum(-2)  # (..., r)
    return inner @ A.T
