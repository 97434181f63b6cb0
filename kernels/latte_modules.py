"""The modules that a LatTE swaps into a model: entry and exit of a segment, expanded norms, expanded matrices.

Between entry and exit the decoder layer's own `residual + hidden` carries `[h; w; t_1 .. t_T]` (kernels/expanded_norm.py), because
every matrix that writes to the residual stream yields all of it and every norm reads all of it. Attention, MLP and cache between
them see what they always see. In post-norm encoders every norm is an exit and the next entry (`PostNorm`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.expanded_norm import NormKind, NormShape, expanded_norm
from adapt_convert.kernels.tasks import Tasks


class SegmentEdge(nn.Module):
    """Where a segment ends (`Q_out (d, R)`), begins (`Q_in (d, R)`), or both: two thin products. LatTE's f_out and f_in."""

    Q_out: Tensor | None
    Q_in: Tensor | None

    def __init__(self, Q_out: Tensor | None, Q_in: Tensor | None, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("Q_out", Q_out, persistent=False)
        # Q^T h and zeros for every t come from one product.
        into = None if Q_in is None else torch.cat([Q_in.T, Q_in.new_zeros(tasks.count * Q_in.shape[1], len(Q_in))])
        self.register_buffer("Q_in", into, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.Q_out is not None:
            x = self._leave(x, self.Q_out)
        if self.Q_in is not None:
            x = torch.cat([x, functional.linear(x, self.Q_in)], dim=-1)
        return x

    def _leave(self, x: Tensor, Q: Tensor) -> Tensor:
        d, r = Q.shape
        if x.shape[-1] != d + (1 + self.tasks.count) * r:
            raise AdaptError(f"the residual stream is {x.shape[-1]} wide where a LatTE of width {d} and rank {r} ends")
        t = x[..., d + r :]
        mask = self.tasks.mask_for(x)
        if mask is not None:
            t = (_by_task(t, r) * _by_row(mask, x)).sum(-2)
        return x[..., :d] + functional.linear(t, Q)


class PostNormEntry(nn.Module):
    """The stream of a post-norm encoder between two of its norms: `h` -> `[h; m_1 w; ..; m_T w; w]` with `w = Q^T h`."""

    Q: Tensor

    def __init__(self, Q: Tensor, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        w = functional.linear(h, self.Q.T)
        mask = self.tasks.mask_for(h)
        own = w if mask is None else (w.unsqueeze(-2) * _by_row(mask, h)).flatten(-2)
        return torch.cat([h, own, w], dim=-1)


class PostNorm(nn.Module):
    """A norm of the residual stream itself, `base`, after a writer's addition: the true residual, its norm, and the next entry.

    It meets `[h + W z; m_k w + S_k z for every task k; w]`, so that `t = S_k z` of a row of task k is the difference of two carried
    parts, and yields the norm of `h + W z + Q t`.
    """

    Q: Tensor

    def __init__(self, base: nn.Module, Q: Tensor, entry: PostNormEntry | None, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.entry, self.tasks = base, entry, tasks
        self.register_buffer("Q", Q, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        d, r = self.Q.shape
        w, t = x[..., -r:], x[..., d:-r]
        mask = self.tasks.mask_for(x)
        t = t - w if mask is None else ((_by_task(t, r) - w.unsqueeze(-2)) * _by_row(mask, x)).sum(-2)
        h: Tensor = self.base(x[..., :d] + functional.linear(t, self.Q))
        return h if self.entry is None else self.entry(h)


def _by_task(parts: Tensor, rank: int) -> Tensor:
    """`(rows, .., T R)` as `(rows, .., T, R)`."""
    return parts.reshape(*parts.shape[:-1], -1, rank)


def _by_row(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of tasks `(rows, T)` as a factor of values `(rows, .., T, R)`, in the dtype of x."""
    return mask.to(x.dtype).view(mask.shape[0], *(1,) * (x.ndim - 2), mask.shape[1], 1)


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
        extra = (1 + tasks.count) * rank
        gain = weight.float() + 1.0 if kind == "gemma" else weight
        self.register_buffer("gain", torch.cat([gain, gain.new_ones(extra)]), persistent=False)
        bias = getattr(base, "bias", None)
        expanded = None if bias is None else torch.cat([bias.detach(), bias.new_zeros(extra)])
        self.register_buffer("bias", expanded, persistent=False)
        self.shape = NormShape(len(weight), rank, tasks.count, kind, norm_eps(base))

    def forward(self, x: Tensor) -> Tensor:
        return expanded_norm(x, self.gain, self.bias, self.tasks.mask_for(x), self.shape)


class ExitNorm(nn.Module):
    """The final norm `base`, after the last segment's exit."""

    def __init__(self, base: nn.Module, exit_edge: SegmentEdge) -> None:
        super().__init__()
        self.base, self.exit_edge = base, exit_edge

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.exit_edge(x))  # type: ignore[no-any-return]


class TaskNorm(nn.Module):
    """A plain norm whose gain, and bias, differ from task to task: `gains (T + 1, d)`, row 0 the base's."""

    gains: Tensor
    biases: Tensor | None
    ones: Tensor

    def __init__(self, base: nn.Module, gains: Tensor, biases: Tensor | None, kind: NormKind, tasks: Tasks) -> None:
        super().__init__()
        self.base, self.tasks = base, tasks
        self.shape = NormShape(gains.shape[1], 0, 1, kind, norm_eps(base))
        self.register_buffer("gains", gains + 1.0 if kind == "gemma" else gains, persistent=False)
        self.register_buffer("biases", biases, persistent=False)
        self.register_buffer("ones", torch.ones_like(gains[0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.tasks.ids_for(x)
        if ids is None:
            return self.base(x)  # type: ignore[no-any-return]
        normed = expanded_norm(x, self.ones, None, None, self.shape)
        shape = (len(ids), *(1,) * (x.ndim - 2), -1)
        scaled = normed * self.gains[ids].view(shape).to(x.dtype)
        return scaled if self.biases is None else scaled + self.biases[ids].view(shape).to(x.dtype)


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a norm, under whichever name its class has it."""
    return next(float(getattr(norm, name)) for name in ("variance_epsilon", "eps") if hasattr(norm, name))


class ExpandedLinear(nn.Module):
    """A matrix with its expansion, one product; `weight (out + .., in + ..)` begins with the base's weight, bit for bit.

    `biases (T + 1, out + ..)` replaces `bias` when tasks differ in it; row 0 is the base's.
    """

    weight: Tensor
    bias: Tensor | None
    biases: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, biases: Tensor | None, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("biases", biases, persistent=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.biases is None:
            return y
        ids = self.tasks.ids_for(x)
        if ids is None:
            return y + self.biases[1]
        return y + self.biases[ids].view(len(ids), *(1,) * (x.ndim - 2), -1)
