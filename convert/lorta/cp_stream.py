"""Passes over the deltas of a CP tensor: bases of its long sides, the core within them, products with factors, and their residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, LowRankDelta, residual_energy
from adapt_convert.convert.lorta.cp_core import Core
from adapt_convert.convert.lorta.cp_tensor import CPFactors, CPShape, Slab
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.side_by_side import side_by_side, single_thread
from adapt_convert.convert.svd import orthonormal

Result = TypeVar("Result")

_ITERATIONS = 5  # of a subspace with a Gram matrix
_BLOCK = 128  # columns of a Gram matrix computed at a time
_TINY = 2**20  # numbers of all deltas: up to here other threads cost more than they gain
_CORE_FLOATS = 2**22  # 16 MB: up to here a larger basis costs less than the passes it saves


@dataclass(frozen=True)
class Bases:
    """Orthonormal columns, float32: `residual (d, k)` and `channel (d_h, p)`; `None` stands for the identity."""

    residual: Tensor | None
    channel: Tensor | None


class Stream:
    """All passes over the data, the only code that loads it. The first pass also sums the energy."""

    def __init__(self, slabs: Sequence[Slab], shape: CPShape, device: torch.device, progress: Progress) -> None:
        self.slabs, self.shape, self.device, self.progress = slabs, shape, device, progress
        self.passes = 0
        self.energy = 0.0

    @property
    def scale(self) -> float:
        """Cores are fitted near unit energy: the thresholds do not know how small deltas are. A power of two rounds nothing."""
        return math.ldexp(1.0, math.frexp(self.energy)[1] // 2)

    def read(self, purpose: str, work: Callable[[Slab, Delta], Result]) -> Iterator[tuple[Slab, Result]]:
        """`work(slab, delta)` of every slab, several at a time unless tiny; the delta is gone when `work` returns.

        One pass in order, the next backwards: the end of a model that does not fit into memory may still be there.
        """
        self.passes += 1
        first = self.passes == 1

        def measured(slab: Slab, delta: Delta) -> tuple[float, Result]:
            return delta.energy() if first else 0.0, work(slab, delta)

        ordered = self.slabs if self.passes % 2 else self.slabs[::-1]
        slabs = self.progress(ordered, f"pass {self.passes}: {purpose}")
        tiny = ((slab, measured(slab, self._load(slab))) for slab in slabs)
        several = side_by_side(slabs, self._nbytes, self._load, measured, self.device)
        for slab, (energy, result) in tiny if self.shape.numbers <= _TINY else several:
            self.energy += energy
            yield slab, result

    def _nbytes(self, slab: Slab) -> int:
        return 4 * self.shape.d * self.shape.columns(slab.matrix)

    def _load(self, slab: Slab) -> Delta:
        delta = slab.load().to(self.device)
        expected = (self.shape.d, self.shape.columns(slab.matrix))
        if delta.shape != expected:
            raise ValueError(
                f"delta of layer {slab.layer}, matrix {slab.matrix}: shape {delta.shape}, expected {expected} (d, heads * d_h)"
            )
        return delta

    def core(self, bases: Bases) -> Core:
        """`T_g[:, m, l, h, :] = Q^T X_h P`, over the stream's scale, float32; zeros where there is no slab."""
        shape = self.shape
        k = shape.d if bases.residual is None else bases.residual.shape[1]
        p = shape.d_h if bases.channel is None else bases.channel.shape[1]
        tensors = tuple(
            torch.zeros(k, len(shape.members(g)), shape.layers, heads, p, device=self.device) for g, heads in enumerate(shape.heads)
        )

        def place(slab: Slab, delta: Delta) -> None:
            group = shape.group[slab.matrix]
            x = delta.dense() if bases.residual is None else delta.rmatmul(bases.residual).T
            x = x.reshape(k, shape.heads[group], shape.d_h)
            x = x if bases.channel is None else x @ bases.channel
            tensors[group][:, shape.members(group).index(slab.matrix), slab.layer] = x  # a place that no other slab has

        for _ in self.read("core", place):
            pass
        for tensor in tensors:
            tensor /= self.scale
        return Core.of(tensors)

    def measure(self, factors: CPFactors, channel: bool, exact: bool) -> tuple[float | None, Tensor, Tensor | None]:
        """The MTTKRP of A `(d, r)` and, with `channel`, of B `(d_h, r)`, float64; with `exact` also the residual of the factors."""
        shape, rank = self.shape, factors.rank
        residual = self._missing(factors) if exact else None
        product_a = torch.zeros(shape.d, rank, dtype=torch.float64, device=self.device)
        product_b = torch.zeros(shape.d_h, rank, dtype=torch.float64, device=self.device) if channel else None

        def parts(slab: Slab, delta: Delta) -> tuple[float, Tensor, Tensor | None]:
            missed = residual_energy(delta, factors.slab(shape.group, slab.layer, slab.matrix)) if exact else 0.0
            part_a = delta.matmul(factors.right(shape.group, slab.layer, slab.matrix))
            if product_b is None:
                return missed, part_a, None
            heads = factors.heads(shape.group, slab.layer, slab.matrix)
            return missed, part_a, torch.einsum("hjr,hr->jr", delta.rmatmul(factors.A).view(-1, shape.d_h, rank), heads)

        for _, (missed, part_a, part_b) in self.read("residual" if exact else "products", parts):
            residual = None if residual is None else residual + missed
            product_a += part_a
            if product_b is not None and part_b is not None:
                product_b += part_b
        return residual, product_a, product_b

    def _missing(self, factors: CPFactors) -> float:
        """The energy that the factors have where there is no slab."""
        places = {(layer, matrix) for layer in range(self.shape.layers) for matrix in range(len(self.shape.group))}
        places -= {(slab.layer, slab.matrix) for slab in self.slabs}
        return sum(factors.slab(self.shape.group, *place).energy() for place in sorted(places))


def basis_of(columns: Tensor) -> Tensor:
    """Orthonormal columns `(n, k)`, float32, that span those of `columns`, float64."""
    with single_thread():
        return orthonormal(columns).float()


def _leading_directions(gram: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """`(d, k)` from what of a Gram matrix lies on and below the diagonal: where the spectrum is flat, no direction is worth waiting for."""
    gram = gram.tril() + gram.tril(-1).T
    basis = torch.randn(len(gram), k, generator=generator, dtype=torch.float64).to(gram.device)
    with single_thread():
        for _ in range(_ITERATIONS):
            basis = orthonormal(gram @ basis)
    return basis.float()


def _gram(delta: Delta) -> Tensor:
    """`X X^T (d, d)`, float32: of a dense delta only what lies below the diagonal, and in blocks on it."""
    if isinstance(delta, LowRankDelta):
        return delta.B @ (delta.A @ delta.A.T) @ delta.B.T
    out = delta.weight.new_zeros(len(delta.weight), len(delta.weight))
    for start in range(0, len(out), _BLOCK):
        torch.mm(delta.weight[start:], delta.weight[start : start + _BLOCK].T, out=out[start:, start : start + _BLOCK])
    return out


def _fold(columns: Tensor, weights: Tensor) -> Tensor:
    """`sum_h weights[h] * columns[h]`, `(heads * d_h, p) -> (d_h, p)`."""
    return torch.einsum("hjp,h->jp", columns.view(weights.shape[0], -1, columns.shape[1]), weights)


def _spread(columns: Tensor, weights: Tensor) -> Tensor:
    """`(d_h, p) -> (heads * d_h, p)`: the transpose of `_fold`."""
    return (weights[:, None, None] * columns).flatten(0, 1)


def find_bases(stream: Stream, rank: int, seed: int) -> Bases:
    """Bases of the residual side and, where `d_h` is wide, of the channels: a Gram matrix if small, else a sketch and a power pass.

    The power pass is not a luxury: the spectrum of a full fine-tune is nearly flat, and a plain sketch of it is hardly better than chance.
    """
    shape = stream.shape
    k = max(4 * rank, 64, _CORE_FLOATS * shape.d // shape.numbers)
    narrow, wide = shape.d > k, shape.d_h > max(4 * k, 256)
    if not narrow and not wide:
        return Bases(None, None)
    generator = torch.Generator().manual_seed(seed)
    if narrow and not wide and shape.d <= 8 * k:
        total = torch.zeros(shape.d, shape.d, dtype=torch.float64, device=stream.device)
        for _, part in stream.read("Gram matrix", lambda slab, delta: _gram(delta)):
            total += part
        return Bases(_leading_directions(total, k, generator), None)
    bases = _sketch_pass(stream, k if narrow else 0, 2 * k if wide else 0, seed)
    return _power_pass(stream, bases, generator)


def _sketch_pass(stream: Stream, k: int, p: int, seed: int) -> Bases:
    """Orthonormal ranges of Gaussian sketches, `k` and `p` columns; 0 for the identity."""
    shape, device = stream.shape, stream.device

    def sketch(slab: Slab, delta: Delta) -> tuple[Tensor | None, Tensor | None]:
        generator = torch.Generator().manual_seed(seed + 1 + slab.layer * len(shape.group) + slab.matrix)  # its own, whatever the order

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device)

        residual = delta.matmul(draw(delta.shape[1], k)) if k else None
        channel = _fold(delta.rmatmul(draw(shape.d, p)), draw(shape.heads[shape.group[slab.matrix]])) if p else None
        return residual, channel

    return _summed_ranges(stream, "sketch", sketch)


def _power_pass(stream: Stream, bases: Bases, generator: torch.Generator) -> Bases:
    """`sum X X^T Q` and `sum_h X_h^T X_h P`, orthonormal; random signs cancel the terms between heads on average."""
    shape, device = stream.shape, stream.device
    signs = {(s.layer, s.matrix): torch.randint(0, 2, (shape.heads[shape.group[s.matrix]],), generator=generator) for s in stream.slabs}

    def power(slab: Slab, delta: Delta) -> tuple[Tensor | None, Tensor | None]:
        residual = channel = None
        if bases.residual is not None:
            residual = delta.matmul(delta.rmatmul(bases.residual))
        if bases.channel is not None:
            own = (signs[slab.layer, slab.matrix] * 2.0 - 1.0).to(device)
            channel = _fold(delta.rmatmul(delta.matmul(_spread(bases.channel, own))), own)
        return residual, channel

    return _summed_ranges(stream, "power", power)


def _summed_ranges(stream: Stream, purpose: str, work: Callable[[Slab, Delta], tuple[Tensor | None, Tensor | None]]) -> Bases:
    """Orthonormal ranges of the sums, over all slabs, of what `work` gives for the residual side and for the channels."""
    sums: list[Tensor | None] = [None, None]
    for _, parts in stream.read(purpose, work):
        for side, part in enumerate(parts):
            if part is not None:
                total = sums[side]
                sums[side] = part.double() if total is None else total.add_(part)
    return Bases(*(None if total is None else basis_of(total) for total in sums))
