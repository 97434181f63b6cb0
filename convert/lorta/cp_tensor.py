"""The CP tensor of a LoRTA: its sizes, the deltas that it is fitted to, its factors, and a finished fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, LowRankDelta


@dataclass(frozen=True)
class Slab:
    """One delta of the tensor: `load()` returns it as `(d, heads * d_h)`, column `h * d_h + j` being channel j of head h.

    `load` is called once per pass and may read a disk each time. `layer` and `matrix` are its rows of `C_l` and `C_m`.
    """

    layer: int
    matrix: int
    load: Callable[[], Delta]


@dataclass(frozen=True)
class CPShape:
    """Sizes of the tensor: `heads[g]` heads in group g, `group[m]` the group of matrix m."""

    d: int
    d_h: int
    layers: int
    heads: tuple[int, ...]
    group: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.d, self.d_h, self.layers, *self.heads, len(self.group), len(self.heads)) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if set(self.group) != set(range(len(self.heads))):
            raise ValueError(f"{self}: group must name each of the {len(self.heads)} head counts at least once, and no other")

    def columns(self, matrix: int) -> int:
        """Columns of a delta of this matrix, `heads * d_h`."""
        return self.heads[self.group[matrix]] * self.d_h

    @property
    def numbers(self) -> int:
        """Entries of all deltas together."""
        return self.d * self.layers * sum(self.columns(matrix) for matrix in range(len(self.group)))

    def members(self, group: int) -> list[int]:
        """The matrices of a group, in order."""
        return [matrix for matrix, own in enumerate(self.group) if own == group]


@dataclass(frozen=True)
class CPFactors:
    """`A (d, r)`, `B (d_h, r)`, `C_h[g] (heads[g], r)`, `C_l (layers, r)`, `C_m (matrices, r)`, float32.

    Columns come in order of falling weight, a column has one norm in all factors (over the groups: in each `C_h` and in `C_m`), and the
    largest entry of a column is positive everywhere but in `C_m`. Where a method takes a `group`, it is that of the `CPShape`.
    """

    A: Tensor
    B: Tensor
    C_h: tuple[Tensor, ...]
    C_l: Tensor
    C_m: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @staticmethod
    def of(named: Mapping[str, Tensor]) -> CPFactors:
        """The factors that `named` gives back."""
        heads = tuple(named[f"C_h{group}"] for group in range(len(named) - 4))
        return CPFactors(named["A"], named["B"], heads, named["C_l"], named["C_m"])

    def named(self) -> dict[str, Tensor]:
        """The factors by name: `A`, `B`, `C_l`, `C_m`, and `C_h0`, `C_h1` .. by group."""
        return {"A": self.A, "B": self.B, "C_l": self.C_l, "C_m": self.C_m} | {f"C_h{g}": value for g, value in enumerate(self.C_h)}

    def heads(self, group: tuple[int, ...], layer: int, matrix: int) -> Tensor:
        """`C_h * C_l * C_m (heads, r)` of one delta: what the columns of A and B weigh in each head."""
        return self.C_h[group[matrix]] * self.C_l[layer] * self.C_m[matrix]

    def right(self, group: tuple[int, ...], layer: int, matrix: int) -> Tensor:
        """`W (heads * d_h, r)` with `X~ = A W^T`, row `h * d_h + j` being channel j of head h."""
        return (self.heads(group, layer, matrix)[:, None, :] * self.B).flatten(0, 1)

    def slab(self, group: tuple[int, ...], layer: int, matrix: int) -> LowRankDelta:
        """The approximation of one delta, `(d, heads * d_h)`, in factors: exact, as `A` is common to all heads."""
        return LowRankDelta(self.A, self.right(group, layer, matrix).T)

    def inner(self, other: CPFactors, group: tuple[int, ...]) -> float:
        """The inner product of two CP tensors, over all layers and matrices, in float64."""
        common = _cross(self.A, other.A) * _cross(self.B, other.B) * _cross(self.C_l, other.C_l)
        total = torch.zeros_like(common)
        for number, (heads, others) in enumerate(zip(self.C_h, other.C_h, strict=True)):
            members = [matrix for matrix, own in enumerate(group) if own == number]
            total += common * _cross(heads, others) * _cross(self.C_m[members], other.C_m[members])
        return float(total.sum())


def _cross(left: Tensor, right: Tensor) -> Tensor:
    return left.double().T @ right.double()


@dataclass(frozen=True)
class CPFit:
    """`energy`: sum of `||X||_F^2`; `residual`: sum of `||X - X~||_F^2` for exactly these factors; `passes`: reads of all the data.

    A (layer, matrix) without a slab counts as a delta of zeros, also in the residual.
    """

    factors: CPFactors
    energy: float
    residual: float
    passes: int
