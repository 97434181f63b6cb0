"""The modules that a LatTE swaps into a model: entry and exit of a segment, expanded norms, expanded matrices.

Between entry and exit the layer's own `residual + hidden` carries `[h; w; t_1 .. t_T]` (kernels/expanded_norm.py), because every
matrix that writes to the residual stream yields all of it and every norm reads all of it. Attention, MLP and cache between them
see what they always see. In post-norm encoders, whose norms act on the stream itself, every norm is an exit and the next entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.family import NormKind
from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.expanded_norm import NormShape, by_row, expanded_norm
from adapt_convert.kernels.tasks import Tasks


class SegmentEntry(nn.Module):
    """`h` -> `[h; w; 0 ..]` with `w = Q^T h`: LatTE's f_in, one thin product."""

    Q: Tensor

    def __init__(self, Q: Tensor, tasks: Tasks) -> None:
        super().__init__()
        self.zeros = tasks.count * Q.shape[1]
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h.to(self.Q.device)  # a layer on another device than the one before moves its inputs only after this
        return functional.pad(torch.cat([h, functional.linear(h, self.Q.T)], dim=-1), (0, self.zeros))


class PostNormEntry(nn.Module):
    """`h` -> `[h; m_1 w; ..; m_T w; 0 ..]`: the entry of a post-norm encoder, whose readers read the stream as it is."""

    Q: Tensor

    def __init__(self, Q: Tensor, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h.to(self.Q.device)
        w, mask = functional.linear(h, self.Q.T), self.tasks.mask_for(h)
        own = w if mask is None else (w.unsqueeze(-2) * by_row(mask, h).unsqueeze(-1).to(w.dtype)).flatten(-2)
        return functional.pad(torch.cat([h, own], dim=-1), (0, own.shape[-1]))


class SegmentExit(nn.Module):
    """The true residual `h + Q t_k` of every row's task k: LatTE's f_out, one thin product. The `t_k` are the last of `width`."""

    Q: Tensor

    def __init__(self, Q: Tensor, width: int, tasks: Tasks) -> None:
        super().__init__()
        self.width, self.tasks = width, tasks
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.Q.device)
        d, r = self.Q.shape
        if x.shape[-1] != self.width:
            raise AdaptError(f"the residual stream is {x.shape[-1]} wide where a LatTE of width {d} and rank {r} ends")
        t, mask = x[..., self.width - self.tasks.count * r :], self.tasks.mask_for(x)
        if mask is not None:
            by_task = t.reshape(*t.shape[:-1], self.tasks.count, r)
            t = (by_task * by_row(mask, x).unsqueeze(-1).to(x.dtype)).sum(-2)
        return x[..., :d] + functional.linear(t, self.Q)


class ExpandedNorm(nn.Module):
    """The base norm `base` over the expanded stream; its own weight stays where it is."""

    gain: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Module, rank: int, kind: NormKind, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.tasks = base, tasks
        weight = base.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        self.shape = NormShape(len(weight), rank, tasks.count, kind, norm_eps(base))
        extra = self.shape.width - len(weight)
        gain = weight.float() + 1.0 if kind == "gemma" else weight
        self.register_buffer("gain", functional.pad(gain, (0, extra), value=1.0), persistent=False)
        bias = getattr(base, "bias", None)
        self.register_buffer("bias", None if bias is None else functional.pad(bias.detach(), (0, extra)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return expanded_norm(x, self.gain, self.bias, self.tasks.mask_for(x), self.shape)


class NormOfResidual(nn.Module):
    """The norm `base` of the true residual, and the entry of the matrices behind it: the final norm, and those of post-norm encoders."""

    def __init__(self, base: nn.Module, leave: SegmentExit, enter: nn.Module | None) -> None:
        super().__init__()
        self.base, self.leave, self.enter = base, leave, enter

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(self.leave(x))
        return h if self.enter is None else self.enter(h)


class TaskNorm(nn.Module):
    """A plain norm whose gain, and bias, differ from task to task: `gains (T + 1, d)`, row 0 the base's, as the norm multiplies."""

    gains: Tensor
    biases: Tensor | None

    def __init__(self, base: nn.Module, gains: Tensor, biases: Tensor | None, kind: NormKind, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.tasks, self.kind, self.eps = base, tasks, kind, norm_eps(base)
        self.register_buffer("gains", gains.float() + 1.0 if kind == "gemma" else gains, persistent=False)
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.tasks.ids_for(x)
        if ids is None:
            return self.base(x)  # type: ignore[no-any-return]
        gains = by_row(self.gains[ids], x)
        if self.kind == "layer":
            normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * gains.float()
            return (normed if self.biases is None else normed + by_row(self.biases[ids], x).float()).to(x.dtype)
        normed = functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * gains if self.kind == "rms" else (normed * gains).to(x.dtype)  # Llama rounds first


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a norm, under whichever name its class has it."""
    return next(float(getattr(norm, name)) for name in ("variance_epsilon", "eps") if hasattr(norm, name))


class ExpandedLinear(nn.Module):
    """A matrix with its expansion, one product; `weight (out + .., in + ..)` begins with the base's weight, bit for bit.

    `biases (T + 1, out + ..)` are the base's and those of every task; without task ids all rows have the `usual` one.
    """

    weight: Tensor
    usual: Tensor | None
    biases: Tensor | None

    def __init__(self, weight: Tensor, biases: Tensor | None, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("usual", None if biases is None else biases[1 if tasks.count == 1 else 0].clone(), persistent=False)
        differ = biases is not None and not torch.equal(biases, biases[:1].expand_as(biases))
        self.register_buffer("biases", biases if differ else None, persistent=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        if self.biases is None or self.tasks.ids is None:
            return functional.linear(x, self.weight, self.usual)
        ids = self.tasks.ids_for(x)
        return functional.linear(x, self.weight) + self.biases[ids].view(-1, *(1,) * (x.ndim - 2), self.out_features)
