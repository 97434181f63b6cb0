"""LoRTA on a live `transformers` model: every adapted matrix adds its slices of the common tensor, never forming them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.lorta.solver import reference_slots
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location
from adapt_convert.formats.lorta import LortaBlock, Slot, read_lorta_blocks
from adapt_convert.formats.peft import PREFIX
from adapt_convert.kernels.lorta import lorta_add, lorta_apply
from adapt_convert.kernels.surgery import Replaced, WrappedLayer, shape_of, weight_of


class LortaSlice(nn.Module):
    """One slice of the tensor: `A (d, r)`, `B (d_h, r)` and `heads (H, r)`, for the rows of a layer's output that `slot` names.

    `A` and `B` are shared by all slices until the model is moved.
    """

    A: Tensor
    B: Tensor
    heads: Tensor

    def __init__(self, slot: Slot, A: Tensor, B: Tensor, heads: Tensor) -> None:
        super().__init__()
        self.slot = slot
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.register_buffer("heads", heads, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        start, stop, reads = self.slot.start, self.slot.stop, self.slot.transposed
        if start is None:
            return lorta_add(y, x, self.A, self.B, self.heads, reads)
        added = lorta_apply(x, self.A, self.B, self.heads, reads)
        if self.slot.stride is not None:
            rows = self.slot.rows(added.shape[-1])
            assert rows is not None
            return y.index_add(-1, rows.to(y.device), added)
        return torch.cat([y[..., :start], y[..., start:stop] + added, y[..., stop:]], dim=-1)


class LortaModule(WrappedLayer):
    """A linear layer with its slices of a LoRTA added."""

    def __init__(self, base: nn.Module, slices: list[LortaSlice]) -> None:
        super().__init__(base)
        self.slices = nn.ModuleList(slices)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for part in self.slices:
            y = part(x, y)
        return y


def load_lorta(model: nn.Module, location: Location, config: dict[str, Any]) -> nn.Module:
    """Add the LoRTA at `location`, whose `adapter_config.json` is `config`; the model is unchanged if that raises `AdaptError`."""
    store = TensorStore(weight_files(location))
    blocks = read_lorta_blocks(location, store, config, reference_slots([name for name, _ in model.named_modules()], _config_of(model)))
    names = {key.removeprefix(PREFIX): key for key in store.infos if not key.rsplit(".", 1)[-1].startswith("lora_")}
    state = Replaced()

    def put_on() -> None:
        for name, key in names.items():
            state.set_parameter(model, name, store.read(key))
        _attach_slices(model, blocks, state)

    return state.fill(model, put_on)


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if config is not None else {}


def _attach_slices(model: nn.Module, blocks: list[LortaBlock], state: Replaced) -> None:
    slices: dict[str, list[LortaSlice]] = {}
    for block in blocks:
        f = block.factors
        shared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for slot in block.slots:
            weight = weight_of(model, slot.module)
            _check_fits(block, slot, shape_of(model, slot.module))
            where = (weight.device, weight.dtype)
            a, b = shared.setdefault(where, (f.A.to(*where), f.B.to(*where)))
            heads = f.heads(block.group, slot.layer, slot.matrix).to(*where)
            slices.setdefault(slot.module, []).append(LortaSlice(slot, a, b, heads))
    for name, parts in slices.items():
        state.swap(model, name, LortaModule(model.get_submodule(name), parts))


def _check_fits(block: LortaBlock, slot: Slot, shape: tuple[int, int]) -> None:
    (rows, columns), found = shape, block.shape(slot)
    filled = slot.rows(found[0])
    if found[1] != columns or (found[0] != rows if filled is None else int(filled.max()) >= rows):
        raise AdaptError(f"the adapter's delta of {slot.module} is {list(found)}, the model's weight {[rows, columns]}")
