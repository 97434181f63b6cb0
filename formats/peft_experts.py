"""Experts in a PEFT LoRA, as PEFT 0.21 loads them onto the stacks that transformers 5 holds in memory.

Two forms. Where PEFT knows a family's names on disk (Mixtral, Qwen-MoE) every expert's factors lie under these, as other consumers
want them too; PEFT stacks them, and for that all experts of all layers need factors of the one rank `r`, gate together with up.
Else each stack is named in `target_parameters`: `lora_A (experts * r, in)`, expert after expert, and `lora_B (out, r * experts)`, in
which the experts alternate. Of several stacks in one module the later wrap the earlier, and each wrapper adds `.base_layer` to the
keys of those within.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.experts import expert_pattern, parts_of_stack, seat_among, stack_pattern
from adapt_convert.convert.family import Experts
from adapt_convert.formats.checkpoint import TensorStore
from adapt_convert.formats.source import Part

Factors = Mapping[str, LowRankDelta]


def complete(factors: Factors, modules: Iterable[str], experts: Experts) -> dict[str, LowRankDelta]:
    """The factors with those of the experts in one rank, and zeros for each expert among `modules` that PEFT wants beside them."""
    if experts.modules is None:
        return dict(factors)
    gate, up, down = experts.modules
    pattern = re.compile(expert_pattern(experts))
    projections = {module: match[1] for module in {*factors, *modules} if (match := pattern.fullmatch(module))}
    rank = max((delta.rank for module, delta in factors.items() if module in projections), default=0)
    result = {module: delta for module, delta in factors.items() if module not in projections}
    for group in ((gate, up), (down,)):
        like = next((delta for module, delta in factors.items() if projections.get(module) in group), None)
        if like is None:
            continue
        zeros = LowRankDelta(torch.zeros_like(like.B), torch.zeros_like(like.A))
        for module in sorted(name for name, projection in projections.items() if projection in group):
            result[module] = factors.get(module, zeros).padded(rank)
    return result


def stacks(factors: Factors, modules: Iterable[str], experts: Experts) -> dict[str, Stack]:
    """The stacks that factors belong to, of a family whose experts PEFT takes as parameters.

    `modules` name all experts of the base; one without factors gets zeros.
    """
    pattern = re.compile(stack_pattern(experts))
    members: dict[str, dict[str, LowRankDelta]] = {}
    everyone: dict[str, list[str]] = {}
    for module in dict.fromkeys([*modules, *factors]):
        if match := pattern.fullmatch(module):
            stack = f"{match['owner']}.{match['parameter']}"
            everyone.setdefault(stack, []).append(module)
            if module in factors:
                members.setdefault(stack, {})[module] = factors[module]
    result = {}
    for stack, held in members.items():
        owner, _, parameter = stack.rpartition(".")
        later = experts.parameters[experts.parameters.index(parameter) + 1 :]
        prefix = owner + ".base_layer" * sum(f"{owner}.{other}" in members for other in later)
        rank = max(delta.rank for delta in held.values())
        like = next(iter(held.values()))
        zeros = LowRankDelta(torch.zeros_like(like.B), torch.zeros_like(like.A))
        each = [held.get(module, zeros).padded(rank) for module in sorted(everyone[stack], key=_number)]
        b = torch.stack([delta.B for delta in each], dim=2).flatten(1)
        result[stack] = Stack(prefix, rank, torch.cat([delta.A for delta in each]), b)
    return result


def _number(module: str) -> int:
    """Of an expert among those of its stack."""
    return int(re.findall(r"\.(\d+)\.[^.]*$", module)[0]) if re.search(r"\.\d+\.[^.]*$", module) else 0


@dataclass(frozen=True)
class Stack:
    """Factors of a stack as PEFT holds them: `A (experts * rank, in)`, `B (out, rank * experts)`, under keys that start with `prefix`."""

    prefix: str
    rank: int
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Targets:
    """What PEFT is told to adapt: `modules` and `parameters` with their ranks, `names` of modules that it translates itself, and the
    `rank` that the config has to have as `r`, None where any will do."""

    modules: Mapping[str, int]
    parameters: Mapping[str, int]
    rank: int | None
    names: tuple[str, ...] = ()


def expert_targets(ranks: Mapping[str, int], stacks: Mapping[str, int], experts: Experts) -> Targets:
    """The targets for factors of the given `ranks`, by module, and of `stacks`, by parameter."""
    if experts.modules is None:
        return Targets(ranks, stacks, None)
    pattern = re.compile(expert_pattern(experts))
    found = {module: match[1] for module in ranks if (match := pattern.fullmatch(module))}
    rank = next((ranks[module] for module in found), None)
    # PEFT takes the name of a shared expert, or of a layer without experts, for one that it has to translate: it gets the parameter.
    shadowed = {module for module in set(ranks) - set(found) if module.rpartition(".")[2] in experts.modules}
    parameters = {f"{module}.weight": ranks[module] for module in shadowed}
    names = tuple(sorted(set(found.values())))
    if experts.by_parameter and rank:
        for seat in (seat_among(module, experts) for module in found):
            assert seat is not None
            parameters[seat.stack] = rank if seat.is_down else 2 * rank
        names = ()
    return Targets({module: r for module, r in ranks.items() if module not in found and module not in shadowed}, parameters, rank, names)


def stack_of(module: str, parameters: Iterable[str], experts: Experts) -> str | None:
    """The stack that the factors under `module` belong to, where `parameters` are an adapter's targets; None where to no stack."""
    owner = re.sub(r"(\.base_layer)+$", "", module)
    if not owner.endswith(f".{experts.stacked}"):
        return None
    order = experts.parameters or ("gate_up_proj", "down_proj")
    adapted = [name for name in order if any(f".{owner}.{name}".endswith(f".{target}") for target in parameters)]
    outer = (len(module) - len(owner)) // len(".base_layer")
    return f"{owner}.{adapted[-1 - outer]}" if outer < len(adapted) else None


def stack_parts(store: TensorStore, key_a: str, key_b: str, stack: str, rank: int, scale: float, experts: Experts) -> Iterable[Part]:
    """One part for each matrix of a stack, from `lora_A (experts * rank, in)` and `lora_B (out, rank * experts)`, `B` times `scale`."""
    (rows, columns), (out, _) = store.infos[key_a].shape, store.infos[key_b].shape
    count, parameter = rows // rank, stack.rpartition(".")[2]
    names = [f"{stack}.weight"] if parameter.endswith("_bias") else parts_of_stack(stack, parameter, count, experts)
    height = out * count // len(names)  # gate and up are halves of one matrix

    def load(number: int) -> LowRankDelta:
        expert, half = divmod(number, len(names) // count)
        a = store.read(key_a).float().reshape(count, rank, columns)[expert]
        b = store.read(key_b).float().reshape(out, rank, count)[half * height : (half + 1) * height, :, expert]
        return LowRankDelta(b * scale, a)

    for number, name in enumerate(names):
        shape = (height, columns)
        yield Part(name, (key_a, key_b), shape, store.infos[key_a].dtype, "low_rank", functools.partial(load, number), rank)


def stacked_among(key: str, loaded: Iterable[str], experts: Experts) -> bool:
    """Whether the factors of one expert, under a key of a file, are in a stack among the keys that PEFT has loaded."""
    match = re.fullmatch(rf"(.*layers\.\d+\.).*\.({'|'.join(experts.modules or ())})(\.lora_[AB]\.weight)", key)
    if match is None or experts.modules is None:
        return False
    start = f"{match[1]}{experts.stacked}"
    return any(other.startswith(start) and other.endswith(match[3]) for other in loaded)
