"""The norm of a LatTE's expanded residual stream, in one pass over the carried values.

The stream carries `[h; w; s_1 .. s_T]`: `h (d)` as the base's weights wrote it, `w = Q^T h (R)`, and for each task `s_k = Q^T h*`, the
same of the true residual `h* = h + Q (s_k - w)`. Q is orthonormal, so `||h*||^2 = ||h||^2 - ||w||^2 + ||s_k||^2`: a sum of squares with
signs, from carried values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

NormKind = Literal["rms", "gemma", "layer"]


@dataclass(frozen=True)
class NormShape:
    """Sizes of an expanded norm: `d` channels of h in a stream of `width`, and the base norm's `kind` and `eps`."""

    d: int
    width: int
    kind: NormKind
    eps: float


def expanded_norm(x: Tensor, gain: Tensor, bias: Tensor | None, signs: Tensor, keeps: Tensor | None, shape: NormShape) -> Tensor:
    """`x (rows, .., width)` divided by the rms of the true residual, times `gain` and plus `bias`; float32 inside.

    `gain (width,)` is the base's gain followed by ones, `bias` its bias followed by zeros. `signs (rows, width)`, or `(1, width)` for
    all rows, weigh the squares; `keeps` of the same shape says by 0 and 1 what the readers of a row may see, None that they
    may see all of it (kernels/tasks.py).
    """
    if x.is_cuda and triton_available():
        from adapt_convert.kernels.expanded_norm_triton import expanded_norm_triton

        return expanded_norm_triton(x, gain, bias, signs, keeps, shape)
    return expanded_norm_reference(x, gain, bias, signs, keeps, shape)


def expanded_norm_reference(x: Tensor, gain: Tensor, bias: Tensor | None, signs: Tensor, keeps: Tensor | None, shape: NormShape) -> Tensor:
    """`expanded_norm` in plain PyTorch."""
    wide = x.float()
    if shape.kind == "layer":
        h = wide[..., : shape.d]
        wide = torch.cat([h - h.mean(-1, keepdim=True), wide[..., shape.d :]], dim=-1)
    squares = wide * wide
    square = squares @ signs[0] if len(signs) == 1 else torch.linalg.vecdot(squares, by_row(signs, x))
    # The cancellation of rounding errors may leave a tiny negative number where the true residual is nearly zero.
    scale = torch.rsqrt(square.clamp_min_(0.0).div_(shape.d).add_(shape.eps)).unsqueeze(-1)
    if shape.kind == "rms":  # Llama's order: round, then multiply by the gain
        normed = (wide * scale).to(x.dtype) * gain.to(x.dtype)
    else:
        normed = wide * scale * gain.float()
        normed = (normed if bias is None else normed + bias.float()).to(x.dtype)
    return normed if keeps is None else normed * by_row(keeps, x).to(x.dtype)


def by_row(factors: Tensor, x: Tensor) -> Tensor:
    """`(rows, width)` as a factor of `x (rows, .., width)`."""
    return factors.view(len(factors), *(1,) * (x.ndim - 2), factors.shape[1])


@cache
def triton_available() -> bool:
    """Whether there is a Triton to import; asked of the import system without importing it."""
    return find_spec("triton") is not None
