"""Factors of experts as `peft` runs them: one pair for all experts of a stack, in which each matrix of the adapter has its part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.experts import seat_of
from adapt_convert.convert.family import Family
from adapt_convert.formats.errors import AdaptError

_AGREE = 1e-4  # share of an expert's change that what is read from the live factors may differ by


@dataclass(frozen=True)
class ExpertPart:
    """One matrix's part of the live factors of a stack: of expert `number` in `A (experts R, in)`, expert after expert, and
    `B (out, R experts)`, in which the experts alternate. Where gate and up are one matrix, they are the two blocks (`part` 0 and 1 of
    `parts`) of a block-diagonal B, and have half of R each.
    """

    stack: str
    A: nn.Parameter
    B: nn.Parameter
    experts: int
    number: int
    part: int
    parts: int

    def read(self) -> LowRankDelta:
        A = self.A.detach().reshape(self.experts, -1, self.A.shape[1])[self.number]
        B = self.B.detach().reshape(len(self.B), -1, self.experts)[:, :, self.number]
        rows, rank = B.shape[0] // self.parts, B.shape[1] // self.parts
        own = slice(self.part * rank, (self.part + 1) * rank)
        return LowRankDelta(B[self.part * rows : (self.part + 1) * rows, own], A[own])

    def mask(self) -> Tensor:
        """Where B may be other than zero, `(out, R experts)`."""
        rows, ranks = self.B.shape[0] // self.parts, self.B.shape[1] // (self.parts * self.experts)
        blocks = torch.zeros(self.parts, rows, self.parts, ranks, 1, device=self.B.device)
        for part in range(self.parts):
            blocks[part, :, part] = 1.0
        return blocks.expand(-1, -1, -1, -1, self.experts).reshape(self.B.shape)


def part_of_stack(root: nn.Module, module: str, family: Family | None, adapter_name: str, factors: LowRankDelta) -> ExpertPart | None:
    """The live factors of an expert's matrix, None of any other module. Raises `AdaptError` where they do not hold `factors`."""
    seat = seat_of(module, family)
    if seat is None:
        return None
    assert family is not None
    assert family.experts is not None
    wrapper: Any = root.get_submodule(seat.owner)
    while wrapper.parameter_name != seat.parameter:  # one wrapper around the other
        wrapper = wrapper.base_layer
    fused = family.experts.modules is not None and not seat.is_down
    part = (family.experts.modules or ()).index(module.rpartition(".")[2]) if fused else 0
    A, B = wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    found = ExpertPart(seat.stack, A, B, wrapper.num_experts, seat.number or 0, part, 2 if fused else 1)
    expected = factors.cast(torch.float32).dense()
    if not torch.allclose(found.read().dense().cpu(), expected, atol=_AGREE * float(expected.abs().max())):
        raise AdaptError(
            f"--refine: this version of peft holds the factors of {module} in a way that is not known here; leave it out with --exclude"
        )
    return found
