"""Quantised weights of a base, dequantised as they are read, with the rounding noise that quantising left in them.

A store goes on naming the model's parameters: what a format spreads over several tensors (codes, scales, tables) appears as one float32
tensor. Its noise is an expectation: an unknown weight is taken to lie evenly anywhere in the cell that its code stands for, so a cell
of width `s` adds `s^2 / 12`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapt_convert.formats.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    Pieces = Iterator[tuple[Tensor, float]]


@dataclass(frozen=True)
class Dequantised:
    """One weight: its `shape`, and `pieces()` of it in order, each float32 with the expected energy of its rounding noise.

    Of a stack that can be read one matrix at a time, each matrix is one piece, and `matrix(number)` is one of them alone.
    """

    shape: tuple[int, ...]
    pieces: Callable[[], Pieces]
    matrix: Callable[[int], Pieces] | None = None


class DequantisedFile:
    """Weights with the face of a `SafetensorsFile`. `noise` has `E ||stored - original||_F^2` of each tensor that was read."""

    def __init__(self, path: Path, weights: dict[str, Dequantised]) -> None:
        self.path = path
        self._weights = weights
        self.infos = {name: _info(name, weight.shape) for name, weight in weights.items()}
        self.noise: dict[str, float] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, float32."""
        import torch

        return torch.cat([piece.flatten() for piece in self._pieces(name)]).view(self.infos[name].shape)

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A tensor's elements in order, 1-D float32, `elements` at a time and fewer in the last block alone."""
        import torch

        held = torch.empty(0)
        for piece in self._pieces(name):
            held = torch.cat([held, piece.flatten()]) if len(held) else piece.flatten()
            whole = len(held) // elements * elements
            yield from torch.split(held[:whole], elements) if whole else ()
            held = held[whole:]
        if len(held):
            yield held

    def _pieces(self, name: str) -> Iterator[Tensor]:
        total = 0.0
        for piece, noise in self._weights[name].pieces():
            total += noise
            yield piece
        self.noise[name] = total

    def split(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Let a tensor appear as `parts`, consecutive pieces of it of one `shape`."""
        weight = self._weights.pop(name)
        del self.infos[name]
        for number, part in enumerate(parts):
            alone = weight.matrix if len(parts) == weight.shape[0] and weight.matrix else functools.partial(_part_of, weight, len(parts))
            self._weights[part] = Dequantised(shape, functools.partial(alone, number))
            self.infos[part] = _info(part, shape)


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, shape, "F32", 4 * math.prod(shape))


def _part_of(weight: Dequantised, count: int, number: int) -> Pieces:
    import torch

    found = list(weight.pieces())
    whole = torch.cat([piece.flatten() for piece, _ in found]).view(count, -1)
    yield whole[number], sum(noise for _, noise in found) / count  # of the parts only the sum is known


def even_noise(step: Tensor, each: int) -> float:
    """Of cells of width `step`, `each` elements in one."""
    return float(step.double().square().sum()) * each / 12


def float_noise(codes: Tensor, scale: Tensor) -> float:
    """Of numbers in a small floating-point format, times a `scale` that broadcasts against them: cells are as wide as their last place."""
    import torch

    about = torch.finfo(codes.dtype)
    values = codes.float().abs()
    exponent = torch.frexp(values).exponent - 1
    last_place = about.eps * torch.ldexp(torch.ones_like(values), exponent).clamp_min(about.tiny)
    return float((last_place * scale).double().square().sum()) / 12


def table_noise(table: Tensor) -> Tensor:
    """Of each code of a table of values within [-1, 1], in the units of the table: a cell reaches half way to its neighbours."""
    import torch

    values, order = table.double().sort()
    middle = (values[1:] + values[:-1]) / 2
    low, high = torch.cat([values[:1], middle]), torch.cat([middle, values[-1:]])
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    noise = ((high - values) ** 3 + (values - low) ** 3) / (3 * width)
    return torch.empty_like(noise).index_copy_(0, order, noise)
