"""Adapters attached to a live model as tensors that gradients reach, and the way back to an adapter that can be written.

Refinement knows an adapter only as a `Trainable`: another kind of adapter joins by an entry in `RECIPES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.architectures import family_of
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.lorta.cp_tensor import CPFactors
from adapt_convert.convert.refinement.trainable_experts import ExpertPart, part_of_stack
from adapt_convert.convert.refinement.trainable_latte import trainable_latte
from adapt_convert.convert.refinement.trainable_loda import trainable_loda
from adapt_convert.convert.refinement.training import Trainable
from adapt_convert.convert.validation.candidates import Contender, Stage
from adapt_convert.formats.loda_config import VARIANTS
from adapt_convert.formats.lorta import LortaAdapter, LortaBlock, Slot
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.kernels.lorta_modules import LortaModule, LortaSlice

_PEFT_NAME = "default"  # what peft calls an adapter that it was given no name for


@contextlib.contextmanager
def trainable_lora(stage: Stage, contender: Contender, adapter: LoraAdapter) -> Iterator[Trainable]:
    """The factors of a LoRA as `peft` runs them; biases and modules stored whole stay as they are."""
    stage.show(contender)
    parameters: dict[str, nn.Parameter] = {}
    experts: dict[str, ExpertPart] = {}
    family = family_of(stage.root.config.to_dict())  # type: ignore[union-attr, operator]
    for module, delta in adapter.factors.items():
        if part := part_of_stack(stage.root, module, family, _PEFT_NAME, delta):
            experts[module] = part
            parameters |= {f"{part.stack}.A": part.A, f"{part.stack}.B": part.B}
            continue
        layer: Any = stage.root.get_submodule(module)
        parameters |= {f"{module}.A": layer.lora_A[_PEFT_NAME].weight, f"{module}.B": layer.lora_B[_PEFT_NAME].weight}
    for module in adapter.embeddings:
        layer = stage.root.get_submodule(module)
        parameters |= {f"{module}.A": layer.lora_embedding_B[_PEFT_NAME], f"{module}.B": layer.lora_embedding_A[_PEFT_NAME]}

    def written() -> LoraAdapter:
        def factors(module: str, old: LowRankDelta, transposed: bool) -> LowRankDelta:
            if module in experts:
                live = experts[module].read()
                return LowRankDelta(_stored(live.B, old.B.dtype), _stored(live.A, old.A.dtype))
            A, B = (parameters[f"{module}.{side}"].detach() for side in "AB")
            dtype = old.A.dtype
            return LowRankDelta(_stored(B.T if transposed else B, dtype), _stored(A.T if transposed else A, dtype))

        linear = {name: factors(name, old, False) for name, old in adapter.factors.items()}
        tables = {name: factors(name, old, True) for name, old in adapter.embeddings.items()}
        return replace(adapter, factors=linear, embeddings=tables)

    with _block_diagonal(experts.values()):
        yield Trainable(stage.model, parameters, written)


@contextlib.contextmanager
def _block_diagonal(parts: Iterable[ExpertPart]) -> Iterator[None]:
    """Keep gate and up apart while the factors that they share are trained: no gradient, and so no step, between them."""
    fused = {part.stack: part for part in parts if part.parts > 1}
    masks = {stack: part.mask() for stack, part in fused.items()}
    handles = [
        part.B.requires_grad_().register_hook(lambda gradient, mask=masks[stack]: gradient * mask)  # type: ignore[no-untyped-call]
        for stack, part in fused.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def trainable_lorta(stage: Stage, contender: Contender, adapter: LortaAdapter) -> Iterator[Trainable]:
    """The factors of a LoRTA: every slice of the model is worked out from them anew before a forward pass."""
    stage.show(contender)
    blocks = [_Block(block, stage.root, stage.device) for block in adapter.blocks]
    parameters = {f"{own.block.name}.{name}": value for own in blocks for name, value in own.parameters.items()}

    def refresh() -> None:
        for own in blocks:
            own.refresh()

    def written() -> LortaAdapter:
        return replace(adapter, blocks=[own.written(adapter.dtype) for own in blocks])

    yield Trainable(stage.model, parameters, written, refresh)


class _Block:
    """One CP tensor as parameters, and the live slices that are made of them."""

    def __init__(self, block: LortaBlock, root: nn.Module, device: torch.device) -> None:
        self.block = block
        named = block.factors.named()
        self.parameters = {name: nn.Parameter(value.to(device, torch.float32, copy=True)) for name, value in named.items()}
        self.slices = [(slot, self._live(root, slot)) for slot in block.slots]
        for _, live in self.slices:
            live.A, live.B = self.parameters["A"], self.parameters["B"]

    @staticmethod
    def _live(root: nn.Module, slot: Slot) -> LortaSlice:
        module = root.get_submodule(slot.module)
        assert isinstance(module, LortaModule)
        return next(part for part in module.slices if isinstance(part, LortaSlice) and part.slot == slot)

    def refresh(self) -> None:
        factors = CPFactors.of(self.parameters)
        for slot, live in self.slices:
            live.heads = factors.heads(self.block.group, slot.layer, slot.matrix)

    def written(self, dtype: torch.dtype) -> LortaBlock:
        written = {name: _stored(value.detach(), dtype).float() for name, value in self.parameters.items()}
        return replace(self.block, factors=CPFactors.of(written))


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to("cpu", dtype, copy=True).contiguous()


@dataclass(frozen=True)
class Recipe:
    """How an adapter of one kind is refined: how it is attached, and Adam's step size as a share of the size of each tensor."""

    attach: Callable[[Stage, Contender, Any], AbstractContextManager[Trainable]]
    rate: float


RECIPES: dict[str, Recipe] = {
    "lora": Recipe(trainable_lora, 0.15),
    "lorta": Recipe(trainable_lorta, 0.2),
    "latte": Recipe(trainable_latte, 0.03),
    **dict.fromkeys(VARIANTS, Recipe(trainable_loda, 0.06)),
}
