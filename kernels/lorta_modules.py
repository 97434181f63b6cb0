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

_FACTORS = ("A", "B", "heads")


class LortaModule(WrappedLayer):
    """A linear layer with its slices of a LoRTA added; `A` and `B` are shared by all layers until the model is moved."""

    def __init__(self, base: nn.Module, slices: list[tuple[Slot, Tensor, Tensor, Tensor]]) -> None:
        super().__init__(base)
        self.slots = [slot for slot, *_ in slices]
        for number, (_, *factors) in enumerate(slices):
            for name, factor in zip(_FACTORS, factors, strict=True):
                self.register_buffer(f"{name}{number}", factor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for number, slot in enumerate(self.slots):
            a, b, heads = (self.get_buffer(f"{name}{number}") for name in _FACTORS)
            if slot.start is None:
                y = lorta_add(y, x, a, b, heads, reads=slot.transposed)
            else:
                added = lorta_apply(x, a, b, heads, reads=slot.transposed)
                y = torch.cat([y[..., : slot.start], y[..., slot.start : slot.stop] + added, y[..., slot.stop :]], dim=-1)
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
    slices: dict[str, list[tuple[Slot, Tensor, Tensor, Tensor]]] = {}
    for block in blocks:
        f = block.factors
        shared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for slot in block.slots:
            weight = weight_of(model, slot.module)
            _check_fits(block, slot, shape_of(model, slot.module))
            where = (weight.device, weight.dtype)
            a, b = shared.setdefault(where, (f.A.to(*where), f.B.to(*where)))
            heads = (f.C_h[block.group[slot.matrix]] * f.C_l[slot.layer] * f.C_m[slot.matrix]).to(*where)
            slices.setdefault(slot.module, []).append((slot, a, b, heads))
    for name, parts in slices.items():
        state.swap(model, name, LortaModule(model.get_submodule(name), parts))


def _check_fits(block: LortaBlock, slot: Slot, shape: tuple[int, int]) -> None:
    (rows, columns), found = shape, block.shape(slot)
    if found[1] != columns or (found[0] != rows if slot.stop is None else slot.stop > rows):
        raise AdaptError(f"the adapter's delta of {slot.module} is {list(found)}, the model's weight {[rows, columns]}")
