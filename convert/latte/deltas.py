"""Effective deltas: the changes of the matrices as the residual stream meets them, norm gains folded in.

A reader computes `W (g * n(h)) + b`, so what has to be added to it is `D_eff = W_ft diag(g_ft) - W_base diag(g_base)`; a writer
adds `D = W_ft - W_base`. Where the norm subtracts a mean, no reader sees the uniform direction of the residual stream, and both
kinds are stripped of it, so that every basis made from them is orthogonal to it. Where the stream itself is normalised (post-norm
encoders), a reader reads it as it is and its delta is `D` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta
from adapt_convert.convert.latte.layout import Layout, layout_of
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.side_by_side import DELTA_BYTES, side_by_side
from adapt_convert.formats.errors import AdaptError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Matrix:
    """One matrix of the network, which `reads` the residual stream or writes to it.

    `norm` is the module between the stream and a reader, None where there is none; `entry` is the matrix's row of the plan, None
    where the source leaves it as it is.
    """

    module: str
    layer: int
    reads: bool
    norm: str | None
    entry: Entry | None


class Effective:
    """The effective deltas and biases of one conversion, read when asked for. Raises `AdaptError` for unsupported bases.

    `spectra`: leading singular values of the deltas, `(k,)` float64, which the search for a basis has come across.
    """

    def __init__(self, pairs: Pairs, plan: Plan) -> None:
        self.pairs, self.plan = pairs, plan
        self.spectra: dict[Matrix, Tensor] = {}
        self._backwards = False  # the next reading of matrices
        self.layout: Layout = layout_of(pairs.base.config, pairs.base.origin)
        self._entries = {entry.name: entry for entry in plan.entries if entry.action != "drop"}
        self.layers = self._count_layers()
        self.matrices = tuple(self._matrices())
        weight = self._base_info(self.matrices[0].module)
        self.width = weight[1]

    def _count_layers(self) -> int:
        head = self.plan.full_name(self.layout.block.format(0) + "." + self.layout.writers[0] + ".weight")
        count = 0
        while head.replace(".0.", f".{count}.", 1) in self.plan.base_keys:
            count += 1
        if not count:
            raise AdaptError(f"{self.pairs.base.origin}: has no {head}; LatTE cannot find its layers")
        return count

    def _matrices(self) -> Iterator[Matrix]:
        for layer in range(self.layers):
            block = self.layout.block.format(layer)
            for norm, readers in self.layout.readers.items():
                for reader in readers:
                    yield self._matrix(f"{block}.{reader}", layer, True, self.module_name(f"{block}.{norm}") if norm else None)
            for writer in self.layout.writers:
                yield self._matrix(f"{block}.{writer}", layer, False, None)

    def _matrix(self, module: str, layer: int, reads: bool, norm: str | None) -> Matrix:
        module = self.module_name(module)
        entry = self._entries.get(f"{module}.weight")
        return Matrix(module, layer, reads, norm, entry if entry and entry.action == "factor" else None)

    def module_name(self, module: str) -> str:
        """A module's name in the model class that the plan is for."""
        return self.plan.full_name(f"{module}.weight").removesuffix(".weight")

    def _base_info(self, module: str) -> tuple[int, int]:
        key = self.plan.base_keys.get(f"{module}.weight")
        if key is None:
            raise AdaptError(f"{self.pairs.base.origin}: has no {module}.weight, which its architecture should have")
        rows, columns = self.pairs.base.infos[key].shape
        return (columns, rows) if self.layout.conv1d else (rows, columns)

    def shape(self, matrix: Matrix) -> tuple[int, int]:
        """`(out, in)`."""
        return self._base_info(matrix.module)

    def each(
        self, matrices: Sequence[Matrix], work: Callable[[Matrix, Delta | None], Result], progress: Progress = silent, what: str = ""
    ) -> Iterator[tuple[Matrix, Result]]:
        """`work(matrix, effective delta)` of every matrix, several at a time; the delta is gone when `work` returns.

        One time in order, the next time backwards: the end of a model that does not fit into memory may still be there.
        """
        self._backwards = not self._backwards
        ordered = matrices if self._backwards else matrices[::-1]
        return side_by_side(progress(ordered, what), self._nbytes, self._passing_delta, work, self.pairs.device)

    def _nbytes(self, matrix: Matrix) -> int:
        return DELTA_BYTES * math.prod(self.shape(matrix))

    def delta(self, matrix: Matrix) -> Delta | None:
        """The effective delta, `(out, in)` float32; None when nothing changed."""
        return self._effective(matrix, self.pairs.delta(matrix.entry) if matrix.entry else None)

    def _passing_delta(self, matrix: Matrix) -> Delta | None:
        """The same, in memory that the thread's next one overwrites, and of a checkpoint in one reading of both sides."""
        entry = matrix.entry
        if entry is None or matrix.norm is None or entry.part.kind != "replace" or self.layout.conv1d:
            return self._effective(matrix, self.pairs.passing_delta(entry) if entry else None)
        return self._centre(self.pairs.passing_effective_delta(entry, *self._gain_and_change(matrix.norm)), dim=1)

    def _effective(self, matrix: Matrix, delta: Delta | None) -> Delta | None:
        if matrix.norm is None:
            return self._centre(delta, dim=0)
        gain, change = self._gain_and_change(matrix.norm)
        if isinstance(delta, LowRankDelta):
            delta = LowRankDelta(delta.B, delta.A * gain)
        elif delta is not None:
            delta = replace(delta, weight=delta.weight.mul_(gain))
        if change is not None:
            delta = self._with_folded_gain(matrix, delta, change)
        return self._centre(delta, dim=1)

    def _with_folded_gain(self, matrix: Matrix, delta: Delta | None, change: Tensor) -> DenseDelta:
        """The delta plus the base's matrix times the change of its gain."""
        base = self.base_weight(matrix.module)
        if not isinstance(delta, DenseDelta):
            return DenseDelta(base * change if delta is None else delta.dense() + base * change)
        return replace(delta, weight=delta.weight.addcmul_(base, change))

    def _centre(self, delta: Delta | None, dim: int) -> Delta | None:
        if delta is None or self.layout.norm != "layer" or self.layout.post_norms:
            return delta
        if isinstance(delta, DenseDelta):
            return replace(delta, weight=delta.weight.sub_(delta.weight.mean(dim, keepdim=True)))
        if dim == 1:
            return LowRankDelta(delta.B, delta.A - delta.A.mean(1, keepdim=True))
        return LowRankDelta(delta.B - delta.B.mean(0, keepdim=True), delta.A)

    def bias(self, matrix: Matrix) -> Tensor | None:
        """What the expanded matrix has to add, exact, float32; None when the base's own bias is right.

        For a reader behind a LayerNorm: the norm goes on adding its base bias, so `W_ft b_norm_ft - W_base b_norm_base` is added here.
        """
        name = f"{matrix.module}.bias"
        old, new = self.vector(name, new=False), self.vector(name, new=True)
        changed = (new - old) if old is not None and new is not None else (new if old is None else None)
        total = torch.zeros(self.shape(matrix)[0], device=self.pairs.device) + (changed if changed is not None else 0.0)
        if matrix.norm is not None and self.layout.norm == "layer":
            total += self._through_norm_bias(matrix)
        if not total.any():
            return None
        return total + old if old is not None else total

    def may_change(self, matrix: Matrix) -> bool:
        """Whether the source holds something that an effective delta is made from: what `delta` says, without reading it."""
        return matrix.entry is not None or f"{matrix.norm}.weight" in self._entries

    def may_need_bias(self, matrix: Matrix) -> bool:
        """The same of `bias`."""
        through_norm = self.layout.norm == "layer" and matrix.norm is not None
        changed = through_norm and (matrix.entry is not None or f"{matrix.norm}.bias" in self._entries)
        return changed or f"{matrix.module}.bias" in self._entries

    def _through_norm_bias(self, matrix: Matrix) -> Tensor:
        old, new = self.vector(f"{matrix.norm}.bias", new=False), self.vector(f"{matrix.norm}.bias", new=True)
        assert old is not None
        assert new is not None
        delta = self.pairs.delta(matrix.entry) if matrix.entry else None
        total = delta.matmul(new[:, None])[:, 0] if delta is not None else torch.zeros(self.shape(matrix)[0], device=self.pairs.device)
        if not torch.equal(new, old):
            total = total + self.base_weight(matrix.module) @ (new - old)
        return total

    def _gain_and_change(self, norm: str) -> tuple[Tensor, Tensor | None]:
        """By what a norm of the fine-tune multiplies, `(d,)` float32, and how much more that is than the base's; None if it is the same."""
        gain, before = self._gain(norm, new=True), self._gain(norm, new=False)
        return gain, None if torch.equal(gain, before) else gain - before

    def _gain(self, norm: str, new: bool) -> Tensor:
        weight = self.vector(f"{norm}.weight", new)
        if weight is None:
            raise AdaptError(f"{self.pairs.base.origin}: has no {norm}.weight, which its architecture should have")
        return weight + 1.0 if self.layout.norm == "gemma" else weight

    def vector(self, name: str, new: bool) -> Tensor | None:
        """A vector parameter, float32; None when neither side has it."""
        entry = self._entries.get(name)
        if new and entry is not None:
            return self.pairs.value(entry).to(self.pairs.device, torch.float32)
        key = self.plan.base_keys.get(name)
        return self.pairs.base.read(key).to(self.pairs.device, torch.float32) if key else None

    def base_weight(self, module: str) -> Tensor:
        """The base's matrix, `(out, in)` float32."""
        weight = self.pairs.base.read(self.plan.base_keys[f"{module}.weight"]).to(self.pairs.device, torch.float32)
        return weight.T if self.layout.conv1d else weight

    def norms_by_task(self) -> frozenset[str]:
        """The norms whose own values each row of a mixed batch can have: those that no delta contains."""
        if not self.layout.post_norms:
            return frozenset({self.module_name(self.layout.final_norm)})
        blocks = [self.layout.block.format(layer) for layer in range(self.layers)]
        return frozenset(self.module_name(f"{block}.{norm}") for block in blocks for norm in self.layout.post_norms)

    def folded(self) -> frozenset[str]:
        """The parameters that need no storing of their own, because the deltas and biases above contain them."""
        names: set[str] = set()
        for matrix in self.matrices:
            names.add(f"{matrix.module}.bias")
            if matrix.norm is not None:
                names |= {f"{matrix.norm}.weight", f"{matrix.norm}.bias"}
        return frozenset(names)


def scaled(delta: Delta, factor: float) -> Delta:
    """A delta times a number."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.B * factor, delta.A)
    return replace(delta, weight=delta.weight * factor)
