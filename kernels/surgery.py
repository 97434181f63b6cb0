"""Replacing modules and values of a live model in such a way that they can be put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.tasks import Tasks

STATE = "_adapt_convert"  # the attribute in which a model that carries an adapter keeps its `Replaced`


@dataclass
class Replaced:
    """What was taken out of a model: modules by name, the former values of overwritten tensors, and parameters that were only tied.

    `untied` has the module, the attribute and the parameter that it shared. `tasks` chooses adapters row by row, where there is a
    choice; `for_all_rows` names values that no row can have for itself.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    untied: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    tasks: Tasks | None = None
    for_all_rows: list[str] = field(default_factory=list)
    guard: Any = None

    def fill(self, model: nn.Module, put_on: Callable[[], None]) -> nn.Module:
        """Mark the model as carrying an adapter and put that on; if it fails, the model is as it was."""
        setattr(model, STATE, self)
        try:
            put_on()
        except BaseException:
            self.restore(model)
            raise
        self.guard = model.register_state_dict_pre_hook(_refuse_saving)  # type: ignore[no-untyped-call]
        return model

    def restore(self, model: nn.Module) -> nn.Module:
        """Every module and value as before, bit for bit, on the device where the model is now; it carries no adapter then.

        Raises `AdaptError`, and leaves the model alone, when it was cast to another dtype meanwhile: the bits are gone.
        """
        self.refuse_cast(model)
        if self.guard is not None:
            self.guard.remove()
        for name, module in self.modules.items():
            self.put_back(model, name, module)
        for owner, attribute, parameter in self.untied:
            setattr(owner, attribute, parameter)
        for tensor, value in reversed(self.values):
            tensor.data = value.to(tensor.device)
        delattr(model, STATE)
        return model

    def refuse_cast(self, model: nn.Module) -> None:
        """Raises `AdaptError` when something that was put in has another dtype than what it stands for."""
        pairs = [(_dtype(model.get_submodule(name)), _dtype(module)) for name, module in self.modules.items()]
        pairs += [(tensor.dtype, value.dtype) for tensor, value in self.values]
        for now, before in pairs:
            if now != before and now is not None and before is not None:
                raise AdaptError(f"the model was cast from {before} to {now} while it carried the adapter; load the base anew instead")

    def put_back(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """The module that was called `name`, on the device of the one in its place."""
        now = next((t.device for t in (*_own(model.get_submodule(name)),)), None)
        if now is not None and any(t.device != now for t in _own(module)):
            module.to(now)
        set_module(model, name, module)

    def swap(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the one called `name`."""
        self.modules.setdefault(name, model.get_submodule(name))
        set_module(model, name, module.train(model.training))

    def set_parameter(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a value in place, so that tied parameters follow; a parameter that is only tied to another is untied."""
        old = _tensor(model, name)
        if old.shape != value.shape:
            larger = value.shape[1:] == old.shape[1:] and len(value) > len(old)
            hint = f"; if the fine-tune added tokens, model.resize_token_embeddings({len(value)}) first" if larger else ""
            raise AdaptError(f"the adapter holds {name} {list(value.shape)}, the model has {list(old.shape)}{hint}")
        value = value.to(old.device, old.dtype)
        is_owner = any(own == name for own, _ in (*model.named_parameters(), *model.named_buffers()))
        if is_owner:
            self.values.append((old, old.data))
            old.data = value
        else:
            assert isinstance(old, nn.Parameter)
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            self.untied.append((owner, attribute, old))
            setattr(owner, attribute, nn.Parameter(value, requires_grad=old.requires_grad))


def _refuse_saving(*_: object) -> None:
    raise AdaptError("the model carries an adapter and would be saved with its parts missing; call adapt_convert.unload(model) first")


def _own(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]


def _dtype(module: nn.Module) -> Any:
    return next((tensor.dtype for tensor in _own(module)), None)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a module that an adapter adapts. Raises `AdaptError` where there is none to adapt."""
    try:
        weight = model.get_parameter(f"{name}.weight")
    except AttributeError:
        raise AdaptError(f"the adapter adapts {name}, which this {type(model).__name__} does not have") from None
    if weight.is_meta or not weight.is_floating_point():
        raise AdaptError(f"{name}.weight is {'offloaded' if weight.is_meta else weight.dtype}; adapters need plain floating-point weights")
    return weight


def shape_of(model: nn.Module, name: str) -> tuple[int, int]:
    """`(out, in)` of an adapted linear layer; GPT-2's `Conv1D` stores its weight the other way round."""
    rows, columns = weight_of(model, name).shape
    return (columns, rows) if type(model.get_submodule(name)).__name__ == "Conv1D" else (rows, columns)


class WrappedLayer(nn.Module):
    """A layer with something added to its output; `base` is the layer, untouched."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:  # callers that look at `.weight` or `.in_features` mean the layer
            return getattr(super().__getattr__("base"), name)  # type: ignore[no-any-return]


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise AdaptError(f"the adapter holds {name}, which this {type(model).__name__} does not have")
    return tensor
