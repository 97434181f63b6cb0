"""The forward pass of one slice of a LoRTA, never forming the slice."""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_convert.kernels.dispatch import runs_on_triton


def lorta_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, heads: Tensor, reads: bool) -> Tensor:
    """`y + x @ D^T`, `y` being what the base's matrix makes of `x`; the other arguments are `lorta_apply`'s.

    Returns `y`, which may have been overwritten.
    """
    if runs_on_triton(y, A.shape[1]) and not (torch.is_grad_enabled() and A.requires_grad):  # the kernel has no backward pass
        from adapt_convert.kernels.lorta_triton import lorta_add_triton

        with torch.cuda.device(y.device):
            return lorta_add_triton(y, x, A, B, heads, reads)
    return y + lorta_apply(x, A, B, heads, reads)


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
