"""The norm of a LatTE's expanded residual stream, in one pass over the carried values.

The stream carries `[h; w; t_1 .. t_T]`: `h (d)` as the base's weights wrote it, `w = Q^T h (R)`, and for each task what its writers
added along Q. The true residual of a row of task k is `h + Q t_k`, and its square norm is `||h||^2 + t_k . (2 w + t_k)`: carried
values only, as Q is orthonormal. (`t` is carried and not `w + t`, the same of the true residual: where a channel of h is very large,
w is, and half precision would leave nothing of the difference.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.family import NormKind
from adapt_convert.kernels.dispatch import runs_on_triton


@dataclass(frozen=True)
class NormShape:
    """Sizes of an expanded norm: stream width `d`, basis `rank`, number of `tasks`, and the base norm's `kind` and `eps`."""

    d: int
    rank: int
    tasks: int
    kind: NormKind
    eps: float

    @property
    def width(self) -> int:
        """Width of the carried stream."""
        return self.d + (1 + self.tasks) * self.rank


def expanded_norm(x: Tensor, gain: Tensor, bias: Tensor | None, mask: Tensor | None, shape: NormShape) -> Tensor:
    """`x (rows, .., d + (1 + T) R)` -> what the expanded readers take, of the same shape.

    One task: `[g h; m w; m t] / rms`, and all rows are its own without a `mask`. More: `[g h; m_1 s; ..; m_T s; t] / rms` with
    `t = sum_k m_k t_k` and `s = w + t`. `mask (rows, T)` has one row for each row of the first dim of x, 1 at its own task and
    else 0, so that a row of no task is the base's. `gain (width,)` is the base's gain followed by ones, `bias` its bias
    followed by zeros. Float32 inside.
    """
    if runs_on_triton(x):
        from adapt_convert.kernels.expanded_norm_triton import expanded_norm_triton

        with torch.cuda.device(x.device):
            return expanded_norm_triton(x, gain, bias, mask, shape)
    return expanded_norm_reference(x, gain, bias, mask, shape)


def expanded_norm_reference(x: Tensor, gain: Tensor, bias: Tensor | None, mask: Tensor | None, shape: NormShape) -> Tensor:
    """`expanded_norm` in plain PyTorch."""
    d, r = shape.d, shape.rank
    wide = x.float()
    h, w, t = torch.split(wide, [d, r, shape.tasks * r], dim=-1)
    if shape.kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    if mask is not None:
        m = by_row(mask, x)
        t = (t.reshape(*t.shape[:-1], shape.tasks, r) * m.unsqueeze(-1)).sum(-2)
        tail = [w * m, t] if shape.tasks == 1 else [((w + t).unsqueeze(-2) * m.unsqueeze(-1)).flatten(-2), t]
        wide = torch.cat([h, *tail], dim=-1)
    elif shape.kind == "layer":
        wide = torch.cat([h, w, t], dim=-1)
    square = torch.linalg.vecdot(h, h) + torch.linalg.vecdot(t, torch.add(t, w, alpha=2.0))
    # The cancellation of rounding errors may leave a tiny negative number where the true residual is nearly zero.
    scale = torch.rsqrt(square.clamp_min_(0.0).div_(d).add_(shape.eps)).unsqueeze(-1)
    if shape.kind == "rms":  # Llama's order: round, then multiply by the gain
        return (wide * scale).to(x.dtype) * gain.to(x.dtype)
    normed = wide * scale * gain.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def by_row(mask: Tensor, x: Tensor) -> Tensor:
    """`(rows, T)` as a factor of values `(rows, .., T)`."""
    return mask.view(len(mask), *(1,) * (x.ndim - 2), mask.shape[1])
