"""The modules that a LatTE swaps into a model: entry and exit of a segment, expanded norms, expanded matrices.

Between entry and exit the layer's own `residual + hidden` carries `[h; w; s_1 .. s_T]` (kernels/expanded_norm.py), because every
matrix that writes to the residual stream yields all of it and every norm reads all of it. Attention, MLP and cache between them
see what they always see. In post-norm encoders, whose norms act on the stream itself, every norm is an exit and the next entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.expanded_norm import NormKind, NormShape, by_row, expanded_norm
from adapt_convert.kernels.tasks import Tasks


class SegmentExit(nn.Module):
    """The true residual `h + Q (s_k - w)` of every row's task k: LatTE's f_out, one thin product."""

    Q: Tensor

    def __init__(self, Q: Tensor, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.width = stream_width(Q, tasks)
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        d, r = self.Q.shape
        if x.shape[-1] != self.width:
            raise AdaptError(f"the residual stream is {x.shape[-1]} wide where a LatTE of width {d} and rank {r} ends")
        signs = self.tasks.factors(x, d, r).signs[:, d:]
        carried = (x[..., d:] * by_row(signs, x).to(x.dtype)).reshape(*x.shape[:-1], -1, r)
        return x[..., :d] + functional.linear(carried.sum(-2), self.Q)


class SegmentEntry(nn.Module):
    """`h` -> `[h; w; s_1 .. s_T]`, all of them `Q^T h` where the row may see them: LatTE's f_in, one thin product."""

    copies: Tensor

    def __init__(self, Q: Tensor, tasks: Tasks) -> None:
        super().__init__()
        self.tasks, self.sizes = tasks, (Q.shape[0], Q.shape[1])
        self.register_buffer("copies", Q.T.repeat(tasks.count + 1, 1), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        x = torch.cat([h, functional.linear(h, self.copies)], dim=-1)
        keeps = self.tasks.factors(h, *self.sizes).keeps
        return x if keeps is None else x * by_row(keeps, x).to(x.dtype)


def stream_width(Q: Tensor, tasks: Tasks) -> int:
    """Channels of the stream that a basis `Q (d, R)` carries for some tasks."""
    return Q.shape[0] + (tasks.count + 1) * Q.shape[1]


class ExpandedNorm(nn.Module):
    """The base norm `base` over the expanded stream; its own weight stays where it is."""

    gain: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Module, Q: Tensor, kind: NormKind, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.tasks, self.rank = base, tasks, Q.shape[1]
        weight = base.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        self.shape = NormShape(len(weight), stream_width(Q, tasks), kind, norm_eps(base))
        gain = weight.float() + 1.0 if kind == "gemma" else weight
        extra = self.shape.width - len(weight)
        self.register_buffer("gain", functional.pad(gain, (0, extra), value=1.0), persistent=False)
        bias = getattr(base, "bias", None)
        self.register_buffer("bias", None if bias is None else functional.pad(bias.detach(), (0, extra)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.tasks.factors(x, self.shape.d, self.rank)
        return expanded_norm(x, self.gain, self.bias, rows.signs, rows.keeps, self.shape)


class NormOfResidual(nn.Module):
    """The norm `base` of the true residual, and the entry of the matrices behind it: the final norm, and those of post-norm encoders."""

    def __init__(self, base: nn.Module, leave: SegmentExit, enter: SegmentEntry | None) -> None:
        super().__init__()
        self.base, self.leave, self.enter = base, leave, enter

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(self.leave(x))
        return h if self.enter is None else self.enter(h)


class TaskNorm(nn.Module):
    """A plain norm whose gain, and bias, differ from task to task: `gains (T + 1, d)`, row 0 the base's."""

    gains: Tensor
    biases: Tensor | None
    ones: Tensor

    def __init__(self, base: nn.Module, gains: Tensor, biases: Tensor | None, kind: NormKind, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.tasks = base, tasks
        self.shape = NormShape(gains.shape[1], gains.shape[1], kind, norm_eps(base))
        self.register_buffer("gains", gains + 1.0 if kind == "gemma" else gains, persistent=False)
        self.register_buffer("biases", biases, persistent=False)
        self.register_buffer("ones", torch.ones_like(gains[:1], dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.tasks.ids_for(x)
        if ids is None:
            return self.base(x)  # type: ignore[no-any-return]
        normed = expanded_norm(x, self.ones[0], None, self.ones, None, self.shape)
        shape = (len(ids), *(1,) * (x.ndim - 2), -1)
        scaled = normed * self.gains[ids].view(shape).to(x.dtype)
        return scaled if self.biases is None else scaled + self.biases[ids].view(shape).to(x.dtype)


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
