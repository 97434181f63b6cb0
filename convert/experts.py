"""Mixtures of experts: every expert's matrix under a name of its own, whether a file holds it alone or in a stack.

`transformers` stacks experts in memory; on disk they lie one by one (Mixtral, Qwen) or stacked (gpt-oss, and what was saved in the
form of memory). A stack is no copy but a view: its experts are consecutive bytes of one tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapt_convert.convert.architectures import in_memory
from adapt_convert.convert.family import Experts, Family
from adapt_convert.formats.checkpoint import TensorStore
from adapt_convert.formats.errors import AdaptError


def split_stacks(store: TensorStore, origin: str, family: Family | None) -> None:
    """Replace every stack of experts in `store` by its experts. Raises `AdaptError` for one that is no stack of matrices."""
    if family is None or family.experts is None:
        return
    experts = family.experts
    for name in list(store.infos):
        stack = in_memory(name, family)
        if _layer_of_stack(stack, experts) is None:
            continue
        parameter, shape = stack.rpartition(".")[2], store.infos[name].shape
        if parameter.endswith("_bias"):
            store.split(name, [f"{stack}.weight"], shape)  # one row for each expert
            continue
        if len(shape) != 3 or 0 in shape or (experts.modules and parameter == "gate_up_proj" and shape[1] % 2):
            raise AdaptError(f"{origin}: {name} is {list(shape)}, expected a stack of matrices, one for each expert")
        parts = parts_of_stack(stack, parameter, shape[0], experts)
        rows = shape[1] // (len(parts) // shape[0])
        store.split(name, parts, (rows, shape[2]))


def parts_of_stack(name: str, parameter: str, count: int, experts: Experts) -> list[str]:
    """The names of the matrices in a stack, in its order: expert by expert, and of one expert gate before up."""
    layer = _layer_of_stack(name, experts)
    assert layer is not None
    if experts.modules is None:
        return [f"{name.rpartition('.')[0]}.{number}.{parameter}.weight" for number in range(count)]
    gate, up, down = experts.modules
    below = (gate, up) if parameter == "gate_up_proj" else (down,)
    return [f"{experts.path.format(layer, number)}.{module}.weight" for number in range(count) for module in below]


def _layer_of_stack(name: str, experts: Experts) -> int | None:
    parameters = experts.parameters or ("gate_up_proj", "down_proj")
    match = re.fullmatch(rf"(?:.*\.)?layers\.(\d+)\.{re.escape(experts.stacked)}\.({'|'.join(parameters)})", name)
    return int(match[1]) if match else None


def is_router(module: str, family: Family | None) -> bool:
    """Whether a module chooses among experts."""
    return bool(family and family.experts and module.endswith(f".{family.experts.router}"))


def is_expert(module: str, family: Family | None) -> bool:
    """Whether a module is a matrix of one expert, under the name that `split_stacks` gives it, or the biases of all."""
    if family is None or family.experts is None:
        return False
    pattern = expert_pattern if family.experts.modules else stack_pattern
    return re.fullmatch(pattern(family.experts), module) is not None


@dataclass(frozen=True)
class Seat:
    """Where an expert's matrix lies in the live model: at `number` of the stack `parameter` of the module `owner`; None for biases, which
    are one matrix of all experts."""

    owner: str
    parameter: str
    number: int | None

    @property
    def stack(self) -> str:
        return f"{self.owner}.{self.parameter}"

    @property
    def is_down(self) -> bool:
        return self.parameter.startswith("down_proj")


def seat_of(module: str, family: Family | None) -> Seat | None:
    """The seat of a module as `split_stacks` names it; None of one that is no expert's."""
    return seat_among(module, family.experts) if family and family.experts else None


def seat_among(module: str, experts: Experts) -> Seat | None:
    """The same of a family with these experts."""
    if experts.modules is None:
        found = re.fullmatch(stack_pattern(experts), module)
        return Seat(found["owner"], found["parameter"], int(found["number"]) if found["number"] else None) if found else None
    if re.fullmatch(expert_pattern(experts), module) is None:
        return None
    owner = re.sub(r"(layers\.\d+)\..*", rf"\1.{experts.stacked}", module)
    head, _, name = module.rpartition(".")
    return Seat(owner, "down_proj" if name == experts.modules[2] else "gate_up_proj", int(head.rpartition(".")[2]))


def stored_together(module: str, family: Family | None) -> tuple[str, str] | None:
    """Of an expert's matrix: what names all those to which PEFT gives one rank, and what those that are stored if any of them is.

    Experts under names of their own have one rank everywhere, gate beside up; experts in a stack that of their stack.
    """
    seat = seat_of(module, family)
    if seat is None:
        return None
    assert family is not None
    assert family.experts is not None
    return ("experts", seat.parameter) if family.experts.modules else (seat.stack, seat.stack)


def expert_pattern(experts: Experts) -> str:
    """Matches the modules of experts that lie one by one; group 1 is gate, up or down by its name."""
    start, between, end = (re.escape(text) for text in experts.path.split("{}"))
    return rf"{start}\d+{between}\d+{end}\.({'|'.join(experts.modules or ())})"


def stack_pattern(experts: Experts) -> str:
    """Matches the modules that `split_stacks` makes of stacks: `owner`, `number` (none for biases) and `parameter`."""
    return rf"(?P<owner>.*\.{re.escape(experts.stacked)})\.(?:(?P<number>\d+)\.)?(?P<parameter>{'|'.join(experts.parameters)})"
