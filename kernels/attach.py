"""Putting an adapter onto a live `transformers` model, and taking it off again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.lorta import reference_slots
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import latte_config_path
from adapt_convert.formats.location import locate, read_json
from adapt_convert.formats.lorta import LortaBlock, Slot, read_lorta_blocks
from adapt_convert.formats.peft import CONFIG, PREFIX
from adapt_convert.formats.source import adapter_config_path
from adapt_convert.kernels.lorta import lorta_add, lorta_apply

_STATE = "_adapt_convert"


class LortaModule(nn.Module):
    """A linear layer with its slices of a LoRTA added; `base` is the untouched layer. The factors are shared, not copied."""

    def __init__(self, base: nn.Module, slices: list[tuple[Slot, Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.base = base
        self.slices = slices

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for slot, a, b, heads in self.slices:
            if slot.start is None:
                y = lorta_add(y, x, a, b, heads, reads=slot.transposed)
            else:
                added = lorta_apply(x, a, b, heads, reads=slot.transposed)
                y = torch.cat([y[..., : slot.start], y[..., slot.start : slot.stop] + added, y[..., slot.stop :]], dim=-1)
        return y

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:  # callers that look at `.weight` or `.in_features` mean the layer
            return getattr(super().__getattr__("base"), name)  # type: ignore[no-any-return]


@dataclass
class _Attached:
    """What `unload` needs: the replaced modules and the former values of overwritten parameters."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)


def load(model: nn.Module, adapter: str | Path, revision: str | None = None) -> nn.Module:
    """Add a LoRTA or LatTE directory to `model` in place and return it; `unload` takes it off.

    `model` is the base, loaded by `transformers`. Raises `AdaptError` when the adapter does not fit it; the model is then as
    it was. A LoRA is loaded by `peft`, its own library.
    """
    if hasattr(model, _STATE):
        raise AdaptError("the model carries an adapter already; call adapt_convert.unload(model) first")
    location = locate(adapter, revision)
    if latte_config_path(location) is not None:
        from adapt_convert.kernels.latte import load_latte

        return load_latte(model, location)
    path = adapter_config_path(location)
    if path is None:
        raise AdaptError(f"{adapter}: has no {CONFIG}; it is not an adapter")
    config = read_json(path)
    if config.get("peft_type") != "LORTA":
        raise AdaptError(f"{adapter}: is a {config.get('peft_type')} adapter; load it with peft.PeftModel.from_pretrained")
    store = TensorStore(weight_files(location))
    blocks = read_lorta_blocks(location, store, config, reference_slots([name for name, _ in model.named_modules()], _config_of(model)))
    names = {key.removeprefix(PREFIX): key for key in store.infos if not key.rsplit(".", 1)[-1].startswith("lora_")}
    state = _Attached()
    setattr(model, _STATE, state)
    try:
        for name, key in names.items():
            _set_parameter(model, name, store.read(key), state)
        _attach_slices(model, blocks, state)
    except BaseException:
        unload(model)
        raise
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off: every module and value is again what it was before `load`, bit for bit."""
    state = getattr(model, _STATE, None)
    if state is None:
        raise AdaptError("the model carries no adapter")
    if not isinstance(state, _Attached):
        return state.restore(model)  # type: ignore[no-any-return]
    for name, module in state.modules.items():
        _set_module(model, name, module)
    for name, parameter in state.untied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
    for name, value in state.values.items():
        _tensor(model, name).data = value
    delattr(model, _STATE)
    return model


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if config is not None else {}


def _attach_slices(model: nn.Module, blocks: list[LortaBlock], state: _Attached) -> None:
    slices: dict[str, list[tuple[Slot, Tensor, Tensor, Tensor]]] = {}
    for block in blocks:
        f = block.factors
        shared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        for slot in block.slots:
            weight = _weight(model, slot.module)
            _check_fits(model, block, slot, weight)
            where = (weight.device, weight.dtype)
            a, b = shared.setdefault(where, (f.A.to(*where), f.B.to(*where)))
            heads = (f.C_h[block.group[slot.matrix]] * f.C_l[slot.layer] * f.C_m[slot.matrix]).to(*where)
            slices.setdefault(slot.module, []).append((slot, a, b, heads))
    for name, parts in slices.items():
        base = model.get_submodule(name)
        state.modules[name] = base
        _set_module(model, name, LortaModule(base, parts))


def _check_fits(model: nn.Module, block: LortaBlock, slot: Slot, weight: Tensor) -> None:
    conv1d = type(model.get_submodule(slot.module)).__name__ == "Conv1D"  # GPT-2 stores (in, out)
    rows, columns = weight.shape[::-1] if conv1d else weight.shape
    found = block.shape(slot)
    if found[1] != columns or (found[0] != rows if slot.stop is None else slot.stop > rows):
        raise AdaptError(f"the adapter's delta of {slot.module} is {list(found)}, the model's weight {[rows, columns]}")


def _weight(model: nn.Module, name: str) -> Tensor:
    try:
        return model.get_parameter(f"{name}.weight")
    except AttributeError:
        raise AdaptError(f"the adapter adapts {name}, which this {type(model).__name__} does not have") from None


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise AdaptError(f"the adapter holds {name}, which this {type(model).__name__} does not have")
    return tensor


def _set_parameter(model: nn.Module, name: str, value: Tensor, state: _Attached) -> None:
    """Overwrite a value in place, so that tied parameters follow; a parameter that is only tied to another is untied."""
    old = _tensor(model, name)
    if old.shape != value.shape:
        raise AdaptError(f"the adapter holds {name} {list(value.shape)}, the model has {list(old.shape)}")
    value = value.to(old.device, old.dtype)
    is_owner = any(own == name for own, _ in (*model.named_parameters(), *model.named_buffers()))
    if is_owner:
        state.values[name] = old.data
        old.data = value
    else:
        assert isinstance(old, nn.Parameter)
        state.untied[name] = old
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=old.requires_grad))
