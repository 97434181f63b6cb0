"""What each expert of a mixture is given: the model runs all of them as one module, so that no hook sees them one by one.

What the module is given - the positions and the experts chosen for each - says what its first matrices read. What the last one reads is
worked out from that with the module's own weights and activation, as its forward does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.experts import Seat


def innermost(module: nn.Module) -> Any:
    """The module within what PEFT has wrapped around it; while that runs, it holds the adapted weights."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def inputs_of_experts(experts: Any, x: Tensor, chosen: Tensor, seats: Mapping[str, Seat]) -> Iterator[tuple[str, Tensor]]:
    """By name what the matrices at `seats` of one module are given, `(tokens, in)`: no row where no token reached the expert.

    `x (positions, in)` is what the module is given, `chosen (positions, k)` the numbers of the experts of each position.
    """
    by_number: dict[int, list[str]] = {}
    for name, seat in seats.items():
        assert seat.number is not None
        by_number.setdefault(seat.number, []).append(name)
    for number, names in by_number.items():
        rows = x[(chosen == number).any(dim=-1)]
        for name in names:
            yield name, _between(experts, number, rows) if seats[name].is_down else rows


def _between(experts: Any, number: int, rows: Tensor) -> Tensor:
    """What an expert's last matrix reads, `(tokens, intermediate)`."""
    weight = experts.gate_up_proj[number]
    bias = experts.gate_up_proj_bias[number] if experts.has_bias else None
    between: Tensor = experts._apply_gate(functional.linear(rows, weight.T if experts.is_transposed else weight, bias))
    return between


def width_of(experts: Any, seat: Seat) -> int:
    """How many channels the matrix at a seat reads."""
    return int(getattr(experts, seat.parameter).shape[1 if experts.is_transposed else 2])
