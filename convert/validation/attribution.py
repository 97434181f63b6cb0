"""Which matrices remove the KL: integrated gradients along the straight line from the base's weights to the candidate's.

With `theta(a) = base + sum_m a_m delta_m`, `KL(base) - KL(candidate) = -sum_m integral_0^1 dKL/da_m(s, .., s) ds`: the share of every
matrix, and they sum to the whole (Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", 2017, Proposition 1). The
integral is taken at Gauss-Legendre nodes on the probe rows.

No weight is touched and no gradient of one is formed: a matrix gets a gate, `y = W x + a D x`, whose derivative is
`<dKL/dy, D x>`. So the base's half precision does not round a small `s D` away, and one delta is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.delta import Delta, LowRankDelta
from adapt_convert.convert.validation.outputs import Batch, call, predictions_of
from adapt_convert.convert.validation.reference_outputs import widened

NODES = 4  # exact for integrands of degree 7; the KL along the line is near a parabola, its derivative near a straight line
_TOKENS = 64  # run together
_AGREEMENT = 0.2  # of the measured difference; a sum further off explains something else


@dataclass(frozen=True)
class Change:
    """What a candidate adds to one parameter of the live base.

    `name` is the parameter. `load` reads the change: a matrix `(out, in)`, an embedding `(vocabulary, hidden)`, any other parameter as
    a matrix with as many rows as it has. A change with a `norm`, the name of a module and how it normalises, multiplies what that
    norm yields before its gain. With `shared`, parameters that share the value and are not named by another change take it too.
    """

    name: str
    load: Callable[[], Delta]
    norm: tuple[str, Literal["rms", "layer"]] | None = None
    shared: bool = False


@dataclass(frozen=True)
class Attribution:
    """Shares of the base's KL on the probe rows: `removed` by parameter, and the `measured` share that the candidate removes."""

    removed: dict[str, float]
    measured: float
    rows: int
    tokens: int

    @property
    def total(self) -> float:
        return sum(self.removed.values())

    @property
    def note(self) -> str | None:
        """Why the shares should not be shown; None when they explain what was measured."""
        if abs(self.total - self.measured) <= _AGREEMENT * abs(self.measured):
            return None
        return f"the shares of single matrices sum to {self.total:.1%} of the base's KL, where {self.measured:.1%} was measured"


@torch.enable_grad()
def removed_kl(root: nn.Module, batch: Batch, reference: Tensor, changes: Sequence[Change], nodes: Sequence[float]) -> dict[str, float]:
    """The KL in nats, summed over the predictions of `batch`, that each change removes.

    `root` is the base, its parameters without gradients; `reference (items, classes)` are the fine-tune's logits; `nodes` are those
    of `quadrature`. The model is left as it was.
    """
    total = torch.zeros(len(changes), dtype=torch.float64)
    weights = dict(zip(*quadrature(), strict=True))
    for node in nodes:
        gates = torch.full((len(changes),), node, device=reference.device, requires_grad=True)
        start = 0
        for piece in _pieces(batch):
            with _gated(root, changes, gates) as model:
                start += _backward(model, piece, reference[start:])
        if gates.grad is not None:
            total -= weights[node] * gates.grad.cpu()
    return dict(zip((change.name for change in changes), total.tolist(), strict=True))


def _backward(model: Callable[..., Any], batch: Batch, reference: Tensor) -> int:
    """Add the gradients of `KL(reference || model)`, summed over the predictions of a batch; returns how many there are."""
    device = reference.device
    logits = predictions_of(call(model, batch, device), batch, device).values
    if logits.requires_grad:  # something that changed reaches the output
        # The gradient of KL(p || softmax(z)) by z is softmax(z) - p: no logarithm meets a class that both exclude.
        theirs = widened(reference[: len(logits)], logits.shape[-1])
        slope = logits.detach().float().softmax(-1).sub_(theirs.float().softmax(-1))
        torch.autograd.backward(logits, slope.to(logits.dtype))
    return len(logits)


def _pieces(batch: Batch) -> Iterator[Batch]:
    """The rows in order, few at a time: what a backward pass keeps grows with their tokens."""
    ids = batch.inputs.get("input_ids")
    rows = 1 if ids is None else max(1, _TOKENS // ids.shape[1])
    for start in range(0, batch.rows, rows):
        cut = slice(start, start + rows)
        scored = batch.scored[cut] if batch.scored is not None else None
        yield Batch({name: value[cut] for name, value in batch.inputs.items()}, None, scored)


def quadrature() -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return [float(node) for node in (nodes + 1) / 2], [float(weight) for weight in weights / 2]


@contextmanager
def _gated(root: nn.Module, changes: Sequence[Change], gates: Tensor) -> Iterator[Callable[..., Any]]:
    """The base with every change added, times its gate, as a function of the inputs."""
    handles: list[Any] = []
    replaced: dict[str, Tensor] = {}
    normed: dict[str, Tensor] = {}
    targets = _targets(root, changes)
    for name, kind in {change.norm for change in changes if change.norm}:
        handles.append(root.get_submodule(name).register_forward_hook(_keep_normed(normed, name, kind)))
    for change, gate in zip(changes, gates.unbind(), strict=True):
        for target in targets[change.name]:
            owner, _, attribute = target.rpartition(".")
            module = _submodule(root, owner)
            if module is None:
                continue
            hook = _hook_for(module, attribute, change, gate, normed)
            if hook is not None:
                handles.append(module.register_forward_hook(hook))
            elif (own := parameter_of(root, target)) is not None:
                value = replaced.get(target, own)
                replaced[target] = (value.float() + gate * _shaped(change.load(), value)).to(value.dtype)
    try:
        yield _Replaced(root, replaced)
    finally:
        for handle in handles:
            handle.remove()


def _targets(root: nn.Module, changes: Sequence[Change]) -> dict[str, list[str]]:
    """The parameters that take each change. One that is only tied to another, and changed by its own name, changes alone."""
    named = {change.name for change in changes}
    sharing: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(name)
    found = {}
    for change in changes:
        group = next((names for names in sharing.values() if names[0] == change.name), []) if change.shared else []
        found[change.name] = [change.name, *(name for name in group[1:] if name not in named)]
    return found


class _Replaced:
    """A model whose `values` stand in for its parameters of these names while it is called."""

    def __init__(self, root: nn.Module, values: dict[str, Tensor]) -> None:
        self._root, self._values = root, values

    def __call__(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self._root, self._values, (), inputs, tie_weights=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root, name)


_Hook = Callable[[nn.Module, Any, Any], Any]


def _hook_for(module: nn.Module, attribute: str, change: Change, gate: Tensor, normed: dict[str, Tensor]) -> _Hook | None:
    """How a change enters a module's output; None where it has to enter the parameter."""
    if attribute == "weight" and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):

        def add_product(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            x = normed[change.norm[0]] if change.norm else inputs[0]
            added: Tensor = _Gate.apply(x, gate, change.load)  # type: ignore[no-untyped-call]
            return output + added.to(output.dtype)

        return add_product
    if attribute == "weight" and type(module) is nn.Embedding:  # its kin shift the ids or scale the rows

        def add_rows(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + (gate * _rows(change.load(), inputs[0])).to(output.dtype)

        return add_rows
    if attribute == "bias" and getattr(module, "bias", None) is None:

        def add_bias(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + (gate * change.load().dense()[:, 0].to(output.device)).to(output.dtype)

        return add_bias
    return None


class _Gate(torch.autograd.Function):
    """`a D x` for `x (.., in)`; the delta is read again for the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, load: Callable[[], Delta]) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.load = load
        rows = load().to(x.device).matmul(x.reshape(-1, x.shape[-1]).float().T).T
        return gate * rows.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        back = ctx.load().to(x.device).rmatmul(gradient.T).T.reshape(x.shape)
        return (gate * back).to(x.dtype), (back * x.float()).sum(), None


def _rows(delta: Delta, index: Tensor) -> Tensor:
    if isinstance(delta, LowRankDelta):
        return delta.B.to(index.device)[index] @ delta.A.to(index.device)
    return delta.weight[index.to(delta.weight.device)].to(index.device)


def _shaped(delta: Delta, like: Tensor) -> Tensor:
    value = delta.dense().to(like.device)
    return value.reshape(like.shape) if value.ndim != like.ndim or value.shape == like.shape else value.T


def _keep_normed(normed: dict[str, Tensor], name: str, kind: Literal["rms", "layer"]) -> _Hook:
    from adapt_convert.kernels.latte_modules import norm_eps

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        x = inputs[0].float()
        normalise = functional.rms_norm if kind == "rms" else functional.layer_norm
        normed[name] = normalise(x, x.shape[-1:], eps=norm_eps(module))

    return keep


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def parameter_of(root: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name, None where the model has none of that name."""
    module = _submodule(root, name.rpartition(".")[0])
    value = getattr(module, name.rpartition(".")[2], None)
    return value if isinstance(value, Tensor) else None
