"""Shared LoRAs on a live `transformers` model: two products common to all rows of a batch, and a small one of each row's own task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location
from adapt_convert.formats.shared_lora import SharedLora, open_shared_lora
from adapt_convert.kernels.surgery import Replaced, WrappedLayer, shape_of, weight_of
from adapt_convert.kernels.tasks import Tasks


class SharedLoraLayer(WrappedLayer):
    """A linear layer to which a row of task k adds `U core_k V x`: `U (out, a)`, `V (b, in)`, `cores (T + 1, a, b)`, zeros first."""

    U: Tensor
    V: Tensor
    cores: Tensor

    def __init__(self, base: nn.Module, U: Tensor, V: Tensor, cores: Tensor, tasks: Tasks) -> None:
        super().__init__(base)
        self.tasks = tasks
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("V", V, persistent=False)
        self.register_buffer("cores", cores, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        rows = functional.linear(x, self.V).reshape(len(x), -1, self.V.shape[0])
        own = torch.bmm(rows, self.cores[self.tasks.rows_of(x)].mT)
        return y + functional.linear(own, self.U).view(y.shape)


def load_shared_lora(model: nn.Module, location: Location) -> nn.Module:
    """Put a shared LoRA onto `model`. Raises `AdaptError`, with the model unchanged, when it is one of another base."""
    opened = open_shared_lora(location)
    tasks = Tasks(len(opened.names))
    state = Replaced(tasks=tasks)

    def put_on() -> None:
        for module in opened.modules:
            weight, shape = weight_of(model, module), shape_of(model, module)
            pair = opened.subspaces(module)
            found = pair.U.shape[0], pair.V.shape[1]
            if found != shape:
                raise AdaptError(f"{location.origin}: its changes of {module} are {list(found)}, the model's weight {list(shape)}")
            U, V, cores = (part.to(weight) for part in (pair.U, pair.V, _stacked(opened, module)))
            state.swap(model, module, SharedLoraLayer(model.get_submodule(module), U, V, cores, tasks))

    return state.fill(model, put_on)


def _stacked(opened: SharedLora, module: str) -> Tensor:
    """The cores of all tasks, `(T + 1, a, b)`: zeros for the base and for a task that leaves the module as it is."""
    a, b = opened.store.infos[f"U.{module}"].shape[1], opened.store.infos[f"V.{module}"].shape[0]
    cores = torch.zeros(len(opened.names) + 1, a, b)
    for number in range(1, len(cores)):
        core = opened.core(number, module)
        if core is not None:
            cores[number] = core
    return cores
