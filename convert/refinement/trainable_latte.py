"""A LatTE as tensors that gradients reach: its residual-stream construction as hooks on the base.

The run-time modules hold the base's weights inside their expanded ones, so that training those would compute a gradient of the whole base.
Here each matrix keeps its weight and adds what the expansion adds: `B Q^T n(h)` for a reader behind the norm `n`, without its
gain; `Q S z` for a writer. That is the expanded model to rounding (kernels/latte.py). Q is trained as any matrix of full rank and made
orthonormal at the end: with `Q = Q' R`, `B R^T` and `R S` in the place of B and S leave every product as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.family import NormKind
from adapt_convert.convert.latte.layout import Layout, layout_of
from adapt_convert.convert.refinement.training import Trainable
from adapt_convert.convert.validation.candidates import Contender, Stage
from adapt_convert.formats.latte import LatteAdapter
from adapt_convert.kernels.latte import Names
from adapt_convert.kernels.latte_modules import norm_eps
from adapt_convert.kernels.surgery import Replaced


@contextlib.contextmanager
def trainable_latte(stage: Stage, contender: Contender, adapter: LatteAdapter) -> Iterator[Trainable]:
    """The bases and blocks of a LatTE of one task; its biases and parameters held by value stay as they are."""
    stage.show(stage.base)
    layout = layout_of(stage.root.config.to_dict(), stage.base.path)  # type: ignore[union-attr, operator]
    hooked = _Hooked(stage.root, adapter, layout, stage.device)
    state = Replaced()
    state.fill(stage.root, functools.partial(_set_exact, stage.root, adapter, hooked.names, state))
    try:
        hooked.hook()
        yield Trainable(stage.root, hooked.parameters, hooked.written)
    finally:
        for handle in hooked.handles:
            handle.remove()
        state.restore(stage.root)


def _set_exact(root: nn.Module, adapter: LatteAdapter, names: Names, state: Replaced) -> None:
    for name, value in adapter.tasks[0].exact.items():
        state.set_parameter(root, names.live(name), value if isinstance(value, Tensor) else value.load())


class _Hooked:
    """The hooks of one LatTE on `root`, and the parameters behind them."""

    def __init__(self, root: nn.Module, adapter: LatteAdapter, layout: Layout, device: torch.device) -> None:
        self.root, self.adapter, self.layout = root, adapter, layout
        self.names = Names(root, layout.layers, adapter)
        self.handles: list[Any] = []
        task = adapter.tasks[0]
        held = {f"segment.{i}.Q": segment.Q for i, segment in enumerate(adapter.segments)}
        held |= {f"reader.{name}": block for name, block in task.readers.items()}
        held |= {f"writer.{name}": block for name, block in task.writers.items()}
        self.parameters = {name: nn.Parameter(value.to(device, torch.float32, copy=True)) for name, value in held.items()}

    def hook(self) -> None:
        for number, segment in enumerate(self.adapter.segments):
            Q = self.parameters[f"segment.{number}.Q"]
            for layer in segment.layers:
                self._hook_layer(self.layout.block.format(layer), Q)

    def _hook_layer(self, path: str, Q: nn.Parameter) -> None:
        for norm_name, readers in self.layout.readers.items():
            seen: list[Tensor] = []  # Q^T n(h), from the norm to the readers behind it
            if norm_name:
                norm = self.root.get_submodule(self.names.live(f"{path}.{norm_name}"))
                self._on(norm, functools.partial(_project, seen, Q, self.layout.norm, norm_eps(norm)))
            for reader in readers:
                self._hook_matrix(f"{path}.{reader}", "reader", Q, seen if norm_name else None)
        for writer in self.layout.writers:
            self._hook_matrix(f"{path}.{writer}", "writer", Q, None)

    def _hook_matrix(self, path: str, role: str, Q: nn.Parameter, seen: list[Tensor] | None) -> None:
        held, module = self.names.held(path), self.root.get_submodule(self.names.live(path))
        block = self.parameters.get(f"{role}.{held}")
        if block is not None:
            self._on(module, functools.partial(_read, block, Q, seen) if role == "reader" else functools.partial(_write, block, Q))
        bias = self.adapter.tasks[0].biases.get(held)
        if bias is not None:
            own = getattr(module, "bias", None)
            change = bias.to(Q) if own is None else bias.to(Q) - own.detach().to(Q)
            self._on(module, lambda _module, _inputs, output, change=change: output + change)

    def _on(self, module: nn.Module, work: Any) -> None:
        self.handles.append(module.register_forward_hook(work))

    def written(self) -> LatteAdapter:
        segments, task = [], replace(self.adapter.tasks[0])
        readers, writers = {}, {}
        for number, segment in enumerate(self.adapter.segments):
            Q, R = torch.linalg.qr(self._basis(number))
            segments.append(replace(segment, Q=Q.float()))
            paths = [self.layout.block.format(layer) for layer in segment.layers]
            for path in paths:
                for name in (self.names.held(f"{path}.{r}") for group in self.layout.readers.values() for r in group):
                    if name in task.readers:
                        readers[name] = (self._value("reader", name) @ R.T).to(task.readers[name].dtype)
                for name in (self.names.held(f"{path}.{w}") for w in self.layout.writers):
                    if name in task.writers:
                        writers[name] = (R @ self._value("writer", name)).to(task.writers[name].dtype)
        return replace(self.adapter, segments=segments, tasks=[replace(task, readers=readers, writers=writers)])

    def _basis(self, number: int) -> Tensor:
        """A segment's Q `(d, R)`; without the uniform direction where norms subtract the mean, as none of them sees it."""
        Q = self.parameters[f"segment.{number}.Q"].detach().cpu().double()
        return Q - Q.mean(dim=0) if self.layout.norm == "layer" and not self.layout.post_norms else Q

    def _value(self, role: str, name: str) -> Tensor:
        return self.parameters[f"{role}.{name}"].detach().cpu().double()


def _project(
    seen: list[Tensor], Q: Tensor, kind: NormKind, eps: float, _norm: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor
) -> None:
    """Behind a norm: what its readers' blocks read, `Q^T n(h)`, with n the norm without gain and bias."""
    h, d = inputs[0], inputs[0].shape[-1:]
    seen[:] = [(functional.layer_norm(h, d, eps=eps) if kind == "layer" else functional.rms_norm(h, d, eps=eps)) @ Q]


def _read(block: Tensor, Q: Tensor, seen: list[Tensor] | None, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + functional.linear(inputs[0] @ Q if seen is None else seen[0], block)


def _write(block: Tensor, Q: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + functional.linear(functional.linear(inputs[0], block), Q)
