"""The solver of LoRTA: one CP tensor over all layers, heads and matrices, fitted to streamed weight deltas.

Paper: arXiv 2410.04060, `X_lm[:, h, :] ~ A diag(C_h[h] * C_l[l] * C_m[m]) B^T`. Matrices with another number of heads (grouped-query
attention) have their own `C_h` and share `A`, `B` and `C_l`. The tensor of all deltas is never formed: a pass over the data finds a
basis of the residual side (CANDELINC: Carroll, Pruzansky and Kruskal 1980; randomised: Halko, Martinsson and Tropp 2011), another one
contracts every delta with it, the fit happens on that core (convert/lorta/cp_start.py), and polishing passes move the basis to where the
exact least-squares `A` wants it. The products of the last pass tell the residual of the float32 factors that are returned; where next to
nothing is left of the data, that pass subtracts them from every delta instead. A tensor of up to 16 MB is its own core, read once.

Memory beside one loaded delta: the core, `k` floats per column of every delta, where `k = max(4 r, 64)` or, as long as the core stays below
16 MB, more (a Llama-8B attention block at rank 16: 84 MB for 5.4 GB of deltas); four times the same again while starts are searched,
or where the fit is near exact and goes on in float64; and `d * d` doubles where `d <= 8 k`. A `d_h` above `max(4 k, 256)` (the MLP
width) is compressed to `2 k`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapt_convert.convert.lorta.cp_als import refine, residual_core
from adapt_convert.convert.lorta.cp_core import Array, Core, Model, as_array, balance, normals, solve_proximal
from adapt_convert.convert.lorta.cp_newton import CoreFit
from adapt_convert.convert.lorta.cp_start import fit_core
from adapt_convert.convert.lorta.cp_stream import Bases, Stream, basis_of, find_bases
from adapt_convert.convert.lorta.cp_tensor import CPFactors, CPFit, CPShape, Slab
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.side_by_side import single_blas_thread, single_thread

_POLISH = 5, 1e-3  # at most so many rounds of two passes each, while one promises this share of the captured energy
_POLISH_SMALL = 60, 1e-5  # the same where passes are cheap: a flat spectrum takes them all
_NEAR_EXACT = 1e-4  # share of the energy left below which float32 sums of columns that cancel would show in it
_SMALL = 2**26  # numbers of all deltas
_FEW_DIGITS = 2e-3  # share left, of the data's energy or that of all columns, below which `||X||^2 - 2 <X, X~> + ||X~||^2` is not used


def _expand(model: Model, bases: Bases, stream: Stream) -> CPFactors:
    """A balanced model of the core as factors of the deltas, in canonical form; the stream's scale undoes that of the core."""
    shape, groups = stream.shape, len(stream.shape.heads)
    columns = [factor.T * stream.scale**0.2 for factor in model]
    for side, basis in enumerate((bases.residual, bases.channel)):
        columns[side] = columns[side] if basis is None else as_array(basis).astype(np.float64) @ columns[side]
    c_m = np.zeros((len(shape.group), columns[0].shape[1]))
    for group in range(groups):
        c_m[shape.members(group)] = columns[3 + groups + group]
    for n in range(3 + groups):
        largest = np.take_along_axis(columns[n], np.abs(columns[n]).argmax(axis=0)[None], axis=0)
        sign = np.where(largest < 0, -1.0, 1.0)
        columns[n] = columns[n] * sign
        rows = slice(None) if n < 3 else shape.members(n - 3)
        c_m[rows] = c_m[rows] * sign
    order = np.argsort(-np.linalg.norm(c_m, axis=0), kind="stable")
    a, b, c_l, *c_h, last = (_float(factor[:, order], stream.device) for factor in [*columns[: 3 + groups], c_m])
    return CPFactors(a, b, tuple(c_h), c_l, last)


def _float(factor: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(factor.astype(np.float32, order="C")).to(device)


def _reduce(factors: CPFactors, bases: Bases, shape: CPShape, scale: float) -> Model:
    """The inverse of `_expand` for factors within the bases."""
    a = factors.A if bases.residual is None else bases.residual.T @ factors.A
    b = factors.B if bases.channel is None else bases.channel.T @ factors.B
    c_m = [factors.C_m[shape.members(g)] for g in range(len(shape.heads))]
    return [as_array(factor.double().T) / scale**0.2 for factor in (a, b, factors.C_l, *factors.C_h, *c_m)]


def _span(factor: Tensor, better: Array, *older: Tensor) -> Tensor | None:
    """A basis of all columns, or `None` (the identity) where that is no larger."""
    columns = torch.cat([factor.double(), torch.from_numpy(better.T).to(factor.device), *(part.double() for part in older)], dim=1)
    return basis_of(columns) if columns.shape[1] < columns.shape[0] else None


def _improve(rhs: Array, normal: Array, old: Array) -> tuple[Array, float]:
    """The least-squares factor for its MTTKRP and normal matrix, and how much it lowers the squared error."""
    new = solve_proximal(rhs, normal, old)
    return new, float(np.vdot(new - old, 2 * rhs - normal @ (new + old)))


def _polish(stream: Stream, core: Core, fit: CoreFit, bases: Bases, rounds: int, tolerance: float) -> tuple[CPFactors, float]:
    """As long as the full data promises a gain, move the bases to the better A (and B) and fit again; and tell what the result misses.

    For fixed other factors the best A follows from its MTTKRP, and so does the gain. The basis of the next core spans the old and the
    new A, so that its fit starts from the old one and cannot lose it, and the A before, which makes the rounds conjugate gradients
    (LOBPCG: Knyazev 2001). The MTTKRP tells the residual, too, unless it is next to nothing.
    """
    shape, older = stream.shape, list[Tensor]()
    factors = _expand(fit.model, bases, stream)
    while True:
        model = _reduce(factors, Bases(None, None), shape, 1.0)
        normal = normals(core, model)
        captured = (core.energy - fit.loss) * stream.scale**2
        columns = float((np.square(model[0]).sum(1) * normal[0].diagonal()).sum())
        near = stream.energy - captured < _FEW_DIGITS * max(stream.energy, columns)
        residual, product_a, product_b = stream.measure(factors, bases.channel is not None, near)
        rhs = as_array(product_a).T
        a, gain = _improve(rhs, normal[0], model[0])
        channel = None
        if product_b is not None:
            b, gain_b = _improve(as_array(product_b).T, normal[1], model[1])
            channel, gain = _span(factors.B, b), gain + gain_b
        if rounds == 0 or gain <= tolerance * captured:
            break
        rounds -= 1
        bases = Bases(_span(factors.A, a, *older), channel)
        core = stream.core(bases)
        with single_thread():
            fit = refine(core, balance(core, _reduce(factors, bases, shape, stream.scale)))
        older = [factors.A]
        factors = _expand(fit.model, bases, stream)
    if residual is None:
        residual = stream.energy + float(np.vdot(model[0], normal[0] @ model[0] - 2 * rhs))
    return factors, residual


def _check(slabs: Sequence[Slab], shape: CPShape, rank: int, starts: int) -> None:
    for name, value in (("rank", rank), ("starts", starts)):
        if value < 1:
            raise ValueError(f"fit_cp: {name} must be at least 1, got {value}")
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
    polish: int | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    progress: Progress = silent,
) -> CPFit:
    """Fit a CP tensor of `rank` columns to all slabs, in one pass where they have at most 4 million numbers, else mostly in 3 to 7.

    A flat spectrum takes up to 14 passes, or 124 where all deltas together have at most 67 million numbers.

    `starts`: at most so many fits of the core, of which the best goes on (only one where it leaves half of the energy), and one before
    them for structured data: see `fit_core`; `polish`: rounds of two passes, at most, after the first measurement. The same input, seed
    and device give the same bytes.

    Raises `ValueError` for a slab outside of the shape, given twice, of another size than the shape says, or not finite, and for a `rank`
    or `starts` below 1.
    """
    _check(slabs, shape, rank, starts)
    stream = Stream(slabs, shape, device, progress)
    with single_blas_thread():
        return _fit(stream, rank, seed, starts, polish)


def _fit(stream: Stream, rank: int, seed: int, starts: int, polish: int | None) -> CPFit:
    shape = stream.shape
    bases = find_bases(stream, rank, seed)
    core = stream.core(bases)
    if not math.isfinite(stream.energy):
        raise ValueError("fit_cp: the deltas are not finite (NaN or Inf)")
    fit = fit_core(core, rank, starts, seed)
    if bases.residual is None and bases.channel is None:  # the core is the data
        factors = _expand(fit.model, bases, stream)
        precise = core.double() if fit.loss < _NEAR_EXACT * core.energy else core
        rest = residual_core(precise, _reduce(factors, bases, shape, stream.scale))
        return CPFit(factors, stream.energy, rest.energy * stream.scale**2, stream.passes)
    rounds, tolerance = _POLISH_SMALL if shape.numbers <= _SMALL else _POLISH
    factors, residual = _polish(stream, core, fit, bases, rounds if polish is None else polish, tolerance)
    return CPFit(factors, stream.energy, residual, stream.passes)
