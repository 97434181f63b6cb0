"""Replacing modules and values of a live model in such a way that they can be put back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.tasks import Tasks

STATE = "_adapt_convert"  # the attribute in which a model that carries an adapter keeps its `Replaced`


@dataclass
class Replaced:
    """What was taken out of a model: modules, former values of overwritten parameters, and parameters that were only tied.

    `tasks` chooses adapters row by row, where there is a choice; `for_all_rows` names values that no row can have for itself.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    tasks: Tasks | None = None
    for_all_rows: list[str] = field(default_factory=list)

    def restore(self, model: nn.Module) -> nn.Module:
        """Every module and value as before, bit for bit; the model carries no adapter then."""
        for name, module in self.modules.items():
            set_module(model, name, module)
        for name, parameter in self.untied.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)
        for name, value in self.values.items():
            _tensor(model, name).data = value
        if hasattr(model, STATE):
            delattr(model, STATE)
        return model

    def swap(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the one called `name`."""
        self.modules.setdefault(name, model.get_submodule(name))
        set_module(model, name, module.train(model.training))

    def set_parameter(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a value in place, so that tied parameters follow; a parameter that is only tied to another is untied."""
        old = _tensor(model, name)
        if old.shape != value.shape:
            raise AdaptError(f"the adapter holds {name} {list(value.shape)}, the model has {list(old.shape)}")
        value = value.to(old.device, old.dtype)
        is_owner = any(own == name for own, _ in (*model.named_parameters(), *model.named_buffers()))
        if is_owner:
            self.values[name] = old.data
            old.data = value
        else:
            assert isinstance(old, nn.Parameter)
            self.untied[name] = old
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=old.requires_grad))


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
