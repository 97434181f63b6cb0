"""LoDA on a live `transformers` model: every adapted layer adds its map, on its own weight or on what replaces that."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location
from adapt_convert.formats.loda import LodaMatrix, read_loda
from adapt_convert.formats.safetensors_file import LazyTensor
from adapt_convert.kernels.loda import loda_apply
from adapt_convert.kernels.surgery import Replaced, WrappedLayer, shape_of, weight_of


class LodaModule(WrappedLayer):
    """A linear layer with a LoDA map added. `f1_in`, `f1_out`, `f2` are None where the map has no such part.

    With `base_down (K, in)` and `base_up (out, K)` the layer's own weight is not used, its bias is.
    """

    A: Tensor
    B: Tensor
    f1_in: Tensor | None
    f1_out: Tensor | None
    f2: Tensor | None
    base_down: Tensor | None
    base_up: Tensor | None

    def __init__(self, base: nn.Module, matrix: LodaMatrix, like: Tensor) -> None:
        super().__init__(base)
        low_rank = matrix.base
        held = {
            "A": matrix.A,
            "B": matrix.B,
            "f1_in": matrix.f1[0] if matrix.f1 else None,
            "f1_out": matrix.f1[1] if matrix.f1 else None,
            "f2": matrix.f2,
            "base_down": low_rank.A if low_rank else None,
            "base_up": low_rank.B if low_rank else None,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor.to(like) if tensor is not None else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        f1 = (self.f1_in, self.f1_out) if self.f1_in is not None and self.f1_out is not None else None
        added = loda_apply(x, self.A, self.B, f1, self.f2)
        if self.base_down is None or self.base_up is None:
            y: Tensor = self.base(x)
            return y + added
        return functional.linear(functional.linear(x, self.base_down), self.base_up, self.base.bias) + added  # type: ignore[arg-type]


def load_loda(model: nn.Module, location: Location) -> nn.Module:
    """Add the LoDA at `location`; the model is unchanged if that raises `AdaptError`."""
    adapter = read_loda(location)
    state = Replaced()

    def put_on() -> None:
        for name, value in adapter.exact.items():
            state.set_parameter(model, name, value.load() if isinstance(value, LazyTensor) else value)
        for module, matrix in adapter.matrices.items():
            _attach(model, module, matrix, state)

    return state.fill(model, put_on)


def _attach(model: nn.Module, module: str, matrix: LodaMatrix, state: Replaced) -> None:
    weight, shape = weight_of(model, module), shape_of(model, module)
    if matrix.shape != shape:
        raise AdaptError(f"the adapter's map of {module} is {list(matrix.shape)}, the model's weight {list(shape)}")
    layer = model.get_submodule(module)
    if matrix.keep is not None:
        keep = matrix.keep.T if type(layer).__name__ == "Conv1D" else matrix.keep
        state.set_parameter(model, f"{module}.weight", torch.where(keep.to(weight.device), weight, 0))
    state.swap(model, module, LodaModule(layer, matrix, weight))
