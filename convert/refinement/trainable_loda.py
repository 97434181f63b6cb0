"""A LoDA as tensors that gradients reach: all parts of its maps, with an f1 of zero where the solver left none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from adapt_convert.convert.refinement.training import Trainable
from adapt_convert.convert.validation.candidates import Contender, Stage
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix
from adapt_convert.kernels.loda_modules import LodaModule

_CAUTION = 0.1  # of the size that a part that starts at zero may come to have, the size that its steps are taken relative to


@contextlib.contextmanager
def trainable_loda(stage: Stage, contender: Contender, adapter: LodaAdapter) -> Iterator[Trainable]:
    """The maps of a LoDA as they run; a weight that replaces the base's stays as it is."""
    stage.show(contender)
    draw = torch.Generator().manual_seed(0)
    maps = {module: _Map(stage, module, matrix, adapter.variant.endswith("+"), draw) for module, matrix in adapter.matrices.items()}
    parameters = {f"{module}.{name}": value for module, own in maps.items() for name, value in own.parameters.items()}

    def refresh() -> None:
        for own in maps.values():
            own.refresh()

    def written() -> LodaAdapter:
        return replace(adapter, matrices={module: own.written().rounded(adapter.dtype) for module, own in maps.items()})

    yield Trainable(stage.model, parameters, written, refresh)


class _Map:
    """One live map as parameters, by the names of the module's tensors.

    A missing f1 starts as a rotation in and zeros out, a missing f2 of a LoDA+ as zeros: the first pass then yields what it did before,
    and gradients flow. Steps are relative to the size of a parameter, so one that starts at zero is trained as `unit * (p - 1)` from
    p = 1; the unit goes by the size of `z = A x` for inputs of size 1.
    """

    def __init__(self, stage: Stage, module: str, matrix: LodaMatrix, plus: bool, draw: torch.Generator) -> None:
        live = stage.root.get_submodule(module)
        assert isinstance(live, LodaModule)
        self.live, self.matrix = live, matrix
        r, out = matrix.rank, matrix.shape[0]
        parts = {"A": matrix.A, "B": matrix.B}
        self.units: dict[str, float] = {}
        z = float(torch.linalg.matrix_norm(matrix.A)) / r**0.5
        if matrix.f1 is None:
            parts |= {"f1_in": torch.linalg.qr(torch.randn(r, r, generator=draw)).Q, "f1_out": torch.ones(r, r)}
            self.units["f1_out"] = _CAUTION * z / r**0.5
        else:
            parts |= {"f1_in": matrix.f1[0], "f1_out": matrix.f1[1]}
        if plus and matrix.f2 is None:
            parts["f2"] = torch.ones(out)
            self.units["f2"] = _CAUTION * z * float(torch.linalg.matrix_norm(matrix.B)) / out**0.5
        elif matrix.f2 is not None:
            parts["f2"] = matrix.f2
        self.parameters = {name: nn.Parameter(value.to(stage.device, torch.float32, copy=True)) for name, value in parts.items()}
        self.refresh()

    def _value(self, name: str) -> Tensor:
        parameter, unit = self.parameters[name], self.units.get(name)
        return parameter if unit is None else unit * (parameter - 1)

    def refresh(self) -> None:
        for name in self.parameters:
            setattr(self.live, name, self._value(name))

    def written(self) -> LodaMatrix:
        parts = {name: self._value(name).detach() for name in self.parameters}
        if not parts["f1_out"].any():
            return replace(self.matrix, A=parts["A"], B=parts["B"], f1=None, f2=None)  # f2 of zero is zero
        return replace(self.matrix, A=parts["A"], B=parts["B"], f1=(parts["f1_in"], parts["f1_out"]), f2=parts.get("f2"))
