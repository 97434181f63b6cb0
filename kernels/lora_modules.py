"""Plain LoRAs on a live `transformers` model, several at once: every row of a batch runs with its own, or with none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import Source
from adapt_convert.kernels.grouped import grouped_lora_add
from adapt_convert.kernels.surgery import Replaced, WrappedLayer, shape_of, weight_of
from adapt_convert.kernels.tasks import Tasks


class GroupedLora(WrappedLayer):
    """A linear layer with the LoRAs of T tasks added row by row: `A (T, r, in)`, `B (T, out, r)`, all scaling folded in."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, tasks: Tasks) -> None:
        super().__init__(base)
        self.tasks = tasks
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return grouped_lora_add(y, x, self.A, self.B, self.tasks.rows_of(x))


def load_loras(model: nn.Module, sources: Sequence[Source]) -> nn.Module:
    """Put opened LoRAs onto `model`; task k is the k-th. Smaller ranks are padded with zeros.

    Raises `AdaptError`, with the model unchanged, for what linear layers cannot hold row by row and for a LoRA of another base.
    """
    if not sources:
        raise AdaptError("the list of LoRAs is empty")
    factors = [_factors(source) for source in sources]
    tasks = Tasks(len(sources))
    state = Replaced(tasks=tasks)

    def put_on() -> None:
        for module in dict.fromkeys(name for held in factors for name in held):
            weight, shape = weight_of(model, module), shape_of(model, module)
            deltas = [held.get(module) for held in factors]
            for delta, source in zip(deltas, sources, strict=True):
                if delta is not None and delta.shape != shape:
                    raise AdaptError(f"{source.origin}: its delta of {module} is {list(delta.shape)}, the model's weight {list(shape)}")
            A, B = _stacked(deltas)
            state.swap(model, module, GroupedLora(model.get_submodule(module), A.to(weight), B.to(weight), tasks))

    return state.fill(model, put_on)


def _factors(source: Source) -> dict[str, LowRankDelta]:
    """The factor pairs of a LoRA by module, `(out, in)`, float32."""
    factors = {}
    for part in source.parts.values():
        embedding = any("lora_embedding" in key for key in part.keys)
        delta = part.load() if part.kind == "low_rank" and not embedding else None
        if not isinstance(delta, LowRankDelta):
            raise AdaptError(f"{source.origin}: holds {part.name}, which is no LoRA of a linear layer; load it alone, with peft")
        factors[part.name.removesuffix(".weight")] = delta
    return factors


def _stacked(deltas: Sequence[LowRankDelta | None]) -> tuple[Tensor, Tensor]:
    """`A (T, r, in)` and `B (T, out, r)` with r the largest rank; zeros for a task without this module."""
    held = [delta for delta in deltas if delta is not None]
    rank = max(delta.rank for delta in held)
    A = torch.zeros(len(deltas), rank, held[0].A.shape[1])
    B = torch.zeros(len(deltas), held[0].B.shape[0], rank)
    for number, delta in enumerate(deltas):
        if delta is not None:
            A[number, : delta.rank], B[number, :, : delta.rank] = delta.A, delta.B
    return A, B
