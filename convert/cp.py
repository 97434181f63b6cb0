"""The solver of LoRTA: one CP tensor over all layers, heads and matrices, fitted to streamed weight deltas.

Paper: arXiv 2410.04060, `X_lm[:, h, :] ~ A diag(C_h[h] * C_l[l] * C_m[m]) B^T`. Matrices with another number of heads (grouped-query
attention) have their own `C_h` and share `A`, `B` and `C_l`. The tensor of all deltas is never formed: a pass over the data finds a
basis of the residual side (CANDELINC: Carroll, Pruzansky and Kruskal 1980; randomised: Halko, Martinsson and Tropp 2011), another one
contracts every delta with it, the fit happens on that core, and polishing passes move the basis to where the exact
least-squares `A` wants it. The last pass measures the residual of the float32 factors that are returned.

Memory beside one loaded delta: the core, `k` floats per column of every delta, where `k = max(4 r, 64)` or, as long as the core stays below
16 MB, more (a Llama-8B attention block at rank 16: 84 MB for 5.4 GB of deltas); the same again while starts are searched, three times
in all where the fit is near exact and goes on in float64; and `d * d` floats where `d <= 8 k`. A `d_h` above `max(4 k, 256)` (the MLP
width) is compressed to `2 k`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.cp_als import fit_core, refine
from adapt_convert.convert.cp_core import Core, Model, balance, normals, solve_proximal
from adapt_convert.convert.delta import Delta, LowRankDelta, residual_energy
from adapt_convert.convert.progress import Progress, silent

_CORE_FLOATS = 2**22  # 16 MB: up to here a larger basis costs less than the passes it saves
_POLISH = 2  # rounds of two passes each
_POLISH_TOLERANCE = 1e-3  # a round must promise this share of the captured energy


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

    def members(self, group: int) -> list[int]:
        """The matrices of a group, in order."""
        return [matrix for matrix, own in enumerate(self.group) if own == group]


@dataclass(frozen=True)
class CPFactors:
    """`A (d, r)`, `B (d_h, r)`, `C_h[g] (heads[g], r)`, `C_l (layers, r)`, `C_m (matrices, r)`, float32.

    Columns come in order of falling weight, a column has one norm in all factors (over the groups: in each `C_h` and in `C_m`), and the
    largest entry of a column is positive everywhere but in `C_m`.
    """

    A: Tensor
    B: Tensor
    C_h: tuple[Tensor, ...]
    C_l: Tensor
    C_m: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def right(self, shape: CPShape, layer: int, matrix: int) -> Tensor:
        """`W (heads * d_h, r)` with `X~ = A W^T`."""
        c = self.C_h[shape.group[matrix]] * self.C_l[layer] * self.C_m[matrix]
        return (c.unsqueeze(1) * self.B).reshape(-1, self.rank)

    def slab(self, shape: CPShape, layer: int, matrix: int) -> LowRankDelta:
        """The approximation of one delta, `(d, heads * d_h)`, in factors: exact, as `A` is common to all heads."""
        return LowRankDelta(self.A, self.right(shape, layer, matrix).T)


@dataclass(frozen=True)
class CPFit:
    """`energy`: sum of `||X||_F^2`; `residual`: sum of `||X - X~||_F^2` for exactly these factors; `passes`: reads of all the data.

    A (layer, matrix) without a slab counts as a delta of zeros, also in the residual.
    """

    factors: CPFactors
    energy: float
    residual: float
    passes: int


@dataclass(frozen=True)
class _Bases:
    """Orthonormal columns, float32: `residual (d, k)` and `channel (d_h, p)`; `None` stands for the identity."""

    residual: Tensor | None
    channel: Tensor | None


class _Stream:
    """All passes over the data, the only code that loads it. The first pass also sums the energy."""

    def __init__(self, slabs: Sequence[Slab], shape: CPShape, device: torch.device, progress: Progress) -> None:
        self.slabs, self.shape, self.device, self.progress = slabs, shape, device, progress
        self.passes = 0
        self.energy = 0.0

    @property
    def scale(self) -> float:
        """Cores are fitted at unit energy: the solver's thresholds do not know how small deltas are."""
        return math.sqrt(self.energy) or 1.0

    def read(self, purpose: str) -> Iterator[tuple[Slab, Delta]]:
        self.passes += 1
        for slab in self.progress(self.slabs, f"pass {self.passes}: {purpose}"):
            delta = slab.load().to(self.device)
            expected = (self.shape.d, self.shape.columns(slab.matrix))
            if delta.shape != expected:
                raise ValueError(
                    f"delta of layer {slab.layer}, matrix {slab.matrix}: shape {delta.shape}, expected {expected} (d, heads * d_h)"
                )
            if self.passes == 1:
                self.energy += delta.energy()
            yield slab, delta

    def core(self, bases: _Bases) -> Core:
        """`T_g[:, m, l, h, :] = Q^T X_h P / sqrt(energy)`, float32; zeros where there is no slab."""
        shape = self.shape
        k = shape.d if bases.residual is None else bases.residual.shape[1]
        p = shape.d_h if bases.channel is None else bases.channel.shape[1]
        tensors = tuple(
            torch.zeros(k, len(shape.members(g)), shape.layers, heads, p, device=self.device) for g, heads in enumerate(shape.heads)
        )
        for slab, delta in self.read("core"):
            group = shape.group[slab.matrix]
            x = delta.dense() if bases.residual is None else delta.rmatmul(bases.residual).T
            x = x.reshape(k, shape.heads[group], shape.d_h)
            x = x if bases.channel is None else x @ bases.channel
            tensors[group][:, shape.members(group).index(slab.matrix), slab.layer] = x
        for tensor in tensors:
            tensor /= self.scale
        return Core.of(tensors)

    def measure(self, factors: CPFactors, channel: bool) -> tuple[float, Tensor, Tensor | None]:
        """Exact residual of the factors, the MTTKRP of A `(d, r)` and, if asked, that of B `(d_h, r)`, float64."""
        shape, rank = self.shape, factors.rank
        missing = {(layer, matrix) for layer in range(shape.layers) for matrix in range(len(shape.group))}
        missing -= {(slab.layer, slab.matrix) for slab in self.slabs}
        residual = sum(factors.slab(shape, *place).energy() for place in sorted(missing))
        product_a = torch.zeros(shape.d, rank, dtype=torch.float64, device=self.device)
        product_b = torch.zeros(shape.d_h, rank, dtype=torch.float64, device=self.device) if channel else None
        for slab, delta in self.read("residual"):
            residual += residual_energy(delta, factors.slab(shape, slab.layer, slab.matrix))
            product_a += delta.matmul(factors.right(shape, slab.layer, slab.matrix))
            if product_b is not None:
                heads = factors.C_h[shape.group[slab.matrix]] * factors.C_l[slab.layer] * factors.C_m[slab.matrix]
                product_b += torch.einsum("hjr,hr->jr", delta.rmatmul(factors.A).view(-1, shape.d_h, rank), heads)
        return residual, product_a, product_b


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns.double()).Q
    return basis.float()


def _gram(delta: Delta) -> Tensor:
    """`X X^T (d, d)`, float32."""
    if isinstance(delta, LowRankDelta):
        return delta.B @ (delta.A @ delta.A.T) @ delta.B.T
    return delta.weight @ delta.weight.T


def _fold(columns: Tensor, weights: Tensor) -> Tensor:
    """`sum_h weights[h] * columns[h]`, `(heads * d_h, p) -> (d_h, p)`."""
    return torch.einsum("hjp,h->jp", columns.view(weights.shape[0], -1, columns.shape[1]), weights)


def _spread(columns: Tensor, weights: Tensor) -> Tensor:
    """`(d_h, p) -> (heads * d_h, p)`: the transpose of `_fold`."""
    return (weights[:, None, None] * columns).flatten(0, 1)


def _find_bases(stream: _Stream, rank: int, seed: int) -> _Bases:
    """Bases of the residual side and, where `d_h` is wide, of the channels: a Gram matrix if small, else a sketch and a power pass.

    The power pass is not a luxury: the spectrum of a full fine-tune is nearly flat, and a plain sketch of it is hardly better than chance.
    """
    shape = stream.shape
    columns = shape.layers * sum(shape.columns(matrix) for matrix in range(len(shape.group)))
    k = max(4 * rank, 64, _CORE_FLOATS // columns)
    narrow, wide = shape.d > k, shape.d_h > max(4 * k, 256)
    if not narrow and not wide:
        return _Bases(None, None)
    generator = torch.Generator().manual_seed(seed)
    if narrow and not wide and shape.d <= 8 * k:
        total = torch.zeros(shape.d, shape.d, dtype=torch.float64, device=stream.device)
        for _, delta in stream.read("Gram matrix"):
            total += _gram(delta)
        return _Bases(torch.linalg.eigh(total).eigenvectors[:, -k:].flip(1).float(), None)
    bases = _sketch_pass(stream, k if narrow else 0, 2 * k if wide else 0, generator)
    return _power_pass(stream, bases, generator)


def _sketch_pass(stream: _Stream, k: int, p: int, generator: torch.Generator) -> _Bases:
    """Orthonormal ranges of Gaussian sketches, `k` and `p` columns; 0 for the identity."""
    shape, device = stream.shape, stream.device

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    residual = torch.zeros(shape.d, k, dtype=torch.float64, device=device)
    channel = torch.zeros(shape.d_h, p, dtype=torch.float64, device=device)
    for slab, delta in stream.read("sketch"):
        if k:
            residual += delta.matmul(draw(delta.shape[1], k))
        if p:
            channel += _fold(delta.rmatmul(draw(shape.d, p)), draw(shape.heads[shape.group[slab.matrix]]))
    return _Bases(_orthonormal(residual) if k else None, _orthonormal(channel) if p else None)


def _power_pass(stream: _Stream, bases: _Bases, generator: torch.Generator) -> _Bases:
    """`sum X X^T Q` and `sum_h X_h^T X_h P`, orthonormal; random signs cancel the terms between heads on average."""
    shape, device = stream.shape, stream.device
    residual = None if bases.residual is None else torch.zeros_like(bases.residual, dtype=torch.float64)
    channel = None if bases.channel is None else torch.zeros_like(bases.channel, dtype=torch.float64)
    for slab, delta in stream.read("power"):
        if residual is not None and bases.residual is not None:
            residual += delta.matmul(delta.rmatmul(bases.residual))
        if channel is not None and bases.channel is not None:
            heads = shape.heads[shape.group[slab.matrix]]
            signs = (torch.randint(0, 2, (heads,), generator=generator) * 2.0 - 1.0).to(device)
            channel += _fold(delta.rmatmul(delta.matmul(_spread(bases.channel, signs))), signs)
    return _Bases(None if residual is None else _orthonormal(residual), None if channel is None else _orthonormal(channel))


def _expand(model: Model, bases: _Bases, shape: CPShape, scale: float) -> CPFactors:
    """A balanced model of the core as factors of the deltas, in canonical form; `scale` undoes that of the core."""
    groups = len(shape.heads)
    model = [factor * scale**0.2 for factor in model]
    model[0] = model[0] if bases.residual is None else bases.residual.double() @ model[0]
    model[1] = model[1] if bases.channel is None else bases.channel.double() @ model[1]
    for n in range(3 + groups):
        largest = model[n].gather(0, model[n].abs().argmax(dim=0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).double()
        model[n] = model[n] * sign
        for group in range(groups) if n < 3 else [n - 3]:
            model[3 + groups + group] = model[3 + groups + group] * sign
    c_m = model[0].new_zeros(len(shape.group), model[0].shape[1])
    for group in range(groups):
        c_m[shape.members(group)] = model[3 + groups + group]
    order = c_m.norm(dim=0).argsort(descending=True, stable=True)
    a, b, c_l, *c_h, c_m = (factor[:, order].float().contiguous() for factor in [*model[: 3 + groups], c_m])
    return CPFactors(a, b, tuple(c_h), c_l, c_m)


def _reduce(factors: CPFactors, bases: _Bases, shape: CPShape, scale: float) -> Model:
    """The inverse of `_expand` for factors within the bases."""
    a = factors.A if bases.residual is None else bases.residual.T @ factors.A
    b = factors.B if bases.channel is None else bases.channel.T @ factors.B
    c_m = [factors.C_m[shape.members(g)] for g in range(len(shape.heads))]
    return [factor.double() / scale**0.2 for factor in (a, b, factors.C_l, *factors.C_h, *c_m)]


def _span(old: Tensor, new: Tensor) -> Tensor | None:
    """A basis of both, or `None` (the identity) where that is no larger."""
    both = torch.cat([old.double(), new], dim=1)
    return _orthonormal(both) if both.shape[1] < both.shape[0] else None


def _improve(rhs: Tensor, normal: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """The least-squares factor for its MTTKRP and normal matrix, and how much it lowers the squared error."""
    old = factor.double()
    new = solve_proximal(rhs, normal, old)
    step = new - old
    return new, float((step * (2 * rhs - (new + old) @ normal)).sum())


def _polish(stream: _Stream, core: Core, model: Model, bases: _Bases, rounds: int) -> tuple[CPFactors, float]:
    """Measure the fit exactly; as long as the full data promises a gain, move the bases to the better A (and B) and fit again.

    For fixed other factors the best A follows from its MTTKRP, which the measuring pass brings along, and so does the gain. The
    basis of the next core spans the old and the new A, so that its fit starts from the old one and cannot lose it.
    """
    shape = stream.shape
    best: tuple[CPFactors, float] | None = None
    while True:
        factors = _expand(model, bases, shape, stream.scale)
        residual, product_a, product_b = stream.measure(factors, bases.channel is not None)
        if best is None or residual < best[1]:
            best = factors, residual
        if rounds == 0 or best[0] is not factors:
            return best
        rounds -= 1
        normal = normals(core, _reduce(factors, _Bases(None, None), shape, 1.0))
        a, gain = _improve(product_a, normal[0], factors.A)
        channel = None
        if product_b is not None:
            b, gain_b = _improve(product_b, normal[1], factors.B)
            channel, gain = _span(factors.B, b), gain + gain_b
        if gain <= _POLISH_TOLERANCE * (stream.energy - residual):
            return best
        bases = _Bases(_span(factors.A, a), channel)
        core = stream.core(bases)
        model = refine(core, balance(core, _reduce(factors, bases, shape, stream.scale))).model


def _check(slabs: Sequence[Slab], shape: CPShape, rank: int) -> None:
    if rank < 1:
        raise ValueError(f"fit_cp: rank must be at least 1, got {rank}")
    seen: set[tuple[int, int]] = set()
    for slab in slabs:
        place = slab.layer, slab.matrix
        if not (0 <= slab.layer < shape.layers and 0 <= slab.matrix < len(shape.group)):
            raise ValueError(f"fit_cp: slab (layer, matrix) = {place} is outside of {shape}")
        if place in seen:
            raise ValueError(f"fit_cp: two slabs for (layer, matrix) = {place}")
        seen.add(place)


def fit_cp(
    slabs: Sequence[Slab],
    shape: CPShape,
    rank: int,
    *,
    seed: int = 0,
    starts: int = 3,
    polish: int = _POLISH,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    progress: Progress = silent,
) -> CPFit:
    """Fit a CP tensor of `rank` columns to all slabs, in 2 to 8 passes over them.

    `starts`: at most so many fits of the core, of which the best goes on (only one where it leaves half of the energy: see
    `fit_core`); `polish`: rounds of two passes, at most, after the first measurement. The same input, seed and device give the same bytes.

    Raises `ValueError` for a slab outside of the shape, given twice, or of another size than the shape says.
    """
    _check(slabs, shape, rank)
    stream = _Stream(slabs, shape, device, progress)
    bases = _find_bases(stream, rank, seed)
    core = stream.core(bases)
    fit = fit_core(core, rank, starts, seed)
    factors, residual = _polish(stream, core, fit.model, bases, polish)
    return CPFit(factors, stream.energy, residual, stream.passes)
