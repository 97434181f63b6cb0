"""What modules of a live model are given while it runs: the activations that calibration and fitting need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adapt_convert.convert.architectures import family_of
from adapt_convert.convert.calibration.expert_inputs import innermost, inputs_of_experts
from adapt_convert.convert.experts import Seat, seat_of
from adapt_convert.convert.validation.outputs import Batch, call
from adapt_convert.formats.errors import AdaptError

Item = TypeVar("Item")


class _Enough(Exception):  # noqa: N818 - no error: it ends a forward pass of which the rest is not needed
    pass


def groups_within(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in order, as many together as have at most `limit` bytes between them; one that alone has more stands alone."""
    group, held = list[Item](), 0
    for item in items:
        own = size(item)
        if group and held + own > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += own
    if group:
        yield group


def live_module(model: nn.Module, name: str) -> nn.Module:
    """A module of the live model by its name. Raises `AdaptError` for one that only the checkpoint has."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdaptError(f"{name}: is no module of the model as transformers builds it; leave it out with --exclude") from None


def experts_module(model: nn.Module, owner: str) -> nn.Module:
    """The module that runs all experts of a layer. Raises `AdaptError` for one that is not told which of them each token is sent to."""
    module: nn.Module = innermost(live_module(model, owner))
    if not hasattr(module, "_apply_gate"):  # of all that transformers runs by positions and numbers of experts
        raise AdaptError(
            f"--calib: {owner} runs all experts on all tokens and shows no routing; convert without --calib, or exclude the experts"
        )
    return module


def seats_of(model: Any, modules: Iterable[str]) -> dict[str, Seat]:
    """The seats of those of the modules that are experts of the live model."""
    config = getattr(model, "config", None)
    family = family_of(config.to_dict()) if config is not None else None
    return {name: seat for name in modules if (seat := seat_of(name, family)) is not None}


def captured_inputs(model: Any, modules: Sequence[str], batches: Iterable[Batch], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Run `model` on every batch and yield what each of the `modules`, by name, was given.

    The inputs are `(tokens, in)`, one row for each position of the batch, in the dtype and on the device of the model; modules
    that share an input share the tensor. The last dim is the one that a linear layer multiplies, also of GPT-2's `Conv1D`.
    An expert of a mixture is given the positions that were sent to it, which may be none.
    Nothing is kept between batches, and no gradients are. A forward pass ends where the last of the modules has been reached, so
    modules of early layers cost a part of one. Raises `AdaptError` when the model does not run on the batch, or not all of the modules.
    """
    held: dict[str, Tensor] = {}
    left: set[str] = set()

    def keep(name: str, x: Tensor) -> None:
        held[name] = x.detach().reshape(-1, x.shape[-1])
        left.discard(name)
        if not left:
            raise _Enough

    def hook(name: str) -> Any:
        return lambda module, inputs: keep(name, inputs[0])

    def experts_hook(seats: dict[str, Seat]) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, chosen = (*args, *kwargs.values())[:2]
            for name, rows in inputs_of_experts(module, x, chosen, seats):
                keep(name, rows)

        return see

    seats = seats_of(model, modules)
    handles = [live_module(model, name).register_forward_pre_hook(hook(name)) for name in modules if name not in seats]
    for owner in dict.fromkeys(seat.owner for seat in seats.values()):
        own = {name: seat for name, seat in seats.items() if seat.owner == owner}
        handles.append(experts_module(model, owner).register_forward_pre_hook(experts_hook(own), with_kwargs=True))
    try:
        for batch in batches:
            held, left = {}, set(modules)
            try:
                with torch.no_grad():
                    call(model, batch, device)
            except _Enough:
                pass
            if idle := next((name for name in modules if name in left), None):
                raise AdaptError(f"{idle}: takes no part when the model runs on the calibration text; leave it out with --exclude")
            yield held
    finally:
        for handle in handles:
            handle.remove()
