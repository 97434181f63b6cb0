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


@contextlib.contextmanager
def trainable_loda(stage: Stage, contender: Contender, adapter: LodaAdapter) -> Iterator[Trainable]:
    """The maps of a LoDA as they run; a weight that replaces the base's stays as it is.

    A missing f1 starts as a rotation in and zeros out, so that the first pass yields what it did before, and gradients flow; a
    missing f2 of a LoDA+ as zeros.
    """
    stage.show(contender)
    draw = torch.Generator().manual_seed(0)
    parameters: dict[str, nn.Parameter] = {}
    for module, matrix in adapter.matrices.items():
        live = stage.root.get_submodule(module)
        assert isinstance(live, LodaModule)
        for name, value in _start(matrix, adapter.variant.endswith("+"), draw).items():
            parameters[f"{module}.{name}"] = nn.Parameter(value.to(stage.device, torch.float32, copy=True))
            setattr(live, name, parameters[f"{module}.{name}"])

    def written() -> LodaAdapter:
        held = {module: _trained(module, matrix, parameters) for module, matrix in adapter.matrices.items()}
        return replace(adapter, matrices={module: matrix.rounded(adapter.dtype) for module, matrix in held.items()})

    yield Trainable(stage.model, parameters, written)


def _start(matrix: LodaMatrix, plus: bool, draw: torch.Generator) -> dict[str, Tensor]:
    r = matrix.rank
    f1 = matrix.f1 or (torch.linalg.qr(torch.randn(r, r, generator=draw)).Q, torch.zeros(r, r))
    parts = {"A": matrix.A, "B": matrix.B, "f1_in": f1[0], "f1_out": f1[1]}
    if plus:
        parts["f2"] = torch.zeros(matrix.shape[0]) if matrix.f2 is None else matrix.f2
    return parts


def _trained(module: str, matrix: LodaMatrix, parameters: dict[str, nn.Parameter]) -> LodaMatrix:
    A, B, f1_in, f1_out = (parameters[f"{module}.{name}"].detach() for name in ("A", "B", "f1_in", "f1_out"))
    if not f1_out.any():
        return replace(matrix, A=A, B=B, f1=None, f2=None)  # f2 of zero is zero
    f2 = parameters.get(f"{module}.f2")
    return replace(matrix, A=A, B=B, f1=(f1_in, f1_out), f2=f2.detach() if f2 is not None else None)
