"""Where the CP fit of a core starts from, and the best fit of several starts.

Sources: Sanchez and Kowalski 1990 (two slices of a tensor of low rank share their eigenvectors: an algebraic start); Kolda and Bader
2009 (deflation by rank-1 terms: a greedy start); Halko, Martinsson and Tropp 2011 (randomised subspace iteration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from adapt_convert.convert.lorta.cp_als import finish, fit_als, refine, residual_core
from adapt_convert.convert.lorta.cp_core import (
    EXACT,
    TINY,
    Array,
    Core,
    Model,
    as_array,
    project,
    random_model,
    sum_of,
)
from adapt_convert.convert.lorta.cp_newton import CoreFit
from adapt_convert.convert.lorta.cp_search import Effort, Search, best_terms
from adapt_convert.convert.side_by_side import single_thread

_REFIT_SWEEPS = 3, 8  # after each round, of the first start and of others, which should go another way
_NEARLY = 0.03  # share of the energy left below which a greedy start looks for an exact fit before it adds columns
_PROBE_STEPS = 40  # Newton steps of that look
_AGREED = 1e-4  # share of the energy: two starts this close have found the same fit
_WIDTH = 3  # leading directions that are looked at, for each column of a model; of a mode shorter than that, no start searches in them
_OVERSAMPLING, _POWER = 8, 2  # of the leading directions: more of them than asked for, iterations
_SIGNAL = 0.02  # share of the energy that they must hold beyond noise for it
_LEAST, _MOST = 0.5, 1.5  # shares of what they hold beyond noise that a model of them holds if they are enough
_WHOLE = 4  # a mode at most so many times as long as its sketch would be wide is decomposed whole
_PAIRS = 8  # of slices, of which the best one gives the algebraic start
_ALGEBRAIC = 3  # such starts, if ALS gets stuck from the first ones: a pair of slices may be an unlucky one
_TERM_SWEEPS = 2  # over the other factors of each of its terms
_NOISE = 0.5  # share of the energy left above which one start is enough
_THOROUGH, _QUICK = Effort(4, 0.7), Effort(3, 0.6)  # where directions are all alike, the thorough one finds percents more


@dataclass(frozen=True)
class _Leading:
    """The leading directions of a core's first mode, of which a model of rank r has no more than r.

    `basis (3 r, k)`, or half of the mode where that is less, but r at least; the core `projected` into it, the energy `held` by the first
    r, and the part of that which is white `noise`: 0 where the other directions are not those of white noise, as their average says
    nothing then. `signal`: what the first r hold beyond the most that directions of white noise would; `full`: none of them is one of
    noise.
    """

    basis: Array
    projected: list[Array]
    held: float
    noise: float
    signal: float
    full: bool


def _leading(core: Core, rank: int, generator: np.random.Generator) -> _Leading:
    """By the Gram matrix of the mode if it is short, else within a sketch of it (randomised subspace iteration)."""
    size, channels = core.sizes()[:2]
    count = min(size, max(rank, min(_WIDTH * rank, size // 2)))
    width = count + _OVERSAMPLING
    basis, projected = np.eye(size), [as_array(tensor.flatten(1)) for tensor in core.tensors]
    if size > _WHOLE * width:
        basis = generator.standard_normal((width, size))
        for _ in range(_POWER):
            parts = zip(project(core, basis), core.tensors, strict=True)
            images = [core.tensor(y.reshape(width, -1)) @ tensor.flatten(1).T for y, tensor in parts]
            basis = np.linalg.qr(as_array(sum_of(images).double()).T)[0].T
        projected = [y.reshape(width, -1) for y in project(core, basis)]
    values, vectors = np.linalg.eigh(sum_of([(y @ y.T).astype(np.float64) for y in projected]))
    turn = vectors[:, : -count - 1 : -1].T
    within = [(turn.astype(y.dtype) @ y).reshape(count, -1, channels) for y in projected]
    held = float(values[-rank:].sum())
    noise = (core.energy - held) / (size - rank) if size >= 2 * rank else 0.0
    edge = noise * (1 + math.sqrt(size / sum(y.shape[1] for y in projected))) ** 2  # Marchenko and Pastur 1967
    white = size >= 2 * rank and values[-rank - 1] <= edge + _AGREED * core.energy
    full = size < 2 * rank or values[-rank] > edge or rank * noise <= _AGREED * core.energy
    signal = float(np.maximum(values[-rank:] - edge, 0.0).sum())
    return _Leading(turn @ basis, within, held, rank * noise if white else 0.0, signal, full)


def _algebraic_model(core: Core, leading: _Leading, rank: int, generator: np.random.Generator) -> Model:
    """A start from the eigenvectors that two slices of the core share, exact where the core is one of that rank in general position.

    Within the leading directions of A and of B each slice is `E diag(.) F^T`; the columns of `E` are those of A, and what a row of its
    inverse leaves of the core is one term of the model.
    """
    within = [y[:rank] for y in leading.projected]
    flat = np.concatenate(within, axis=1)
    rows = flat.reshape(-1, flat.shape[2])
    channels = np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, -rank:]
    slices = (flat @ channels.astype(flat.dtype)).transpose(1, 0, 2).reshape(flat.shape[1], -1)
    vectors = _shared_eigenvectors(slices, rank, generator)
    inverse = np.linalg.pinv(vectors)
    terms = [(inverse.astype(y.dtype) @ y.reshape(rank, -1)).reshape(y.shape) for y in within]
    search = Search(core, [vectors.T @ leading.basis[:rank], *random_model(core, rank, generator)[1:]])
    for _ in range(_TERM_SWEEPS):
        search.others(terms)
    return search.scaled()


def _shared_eigenvectors(slices: Array, rank: int, generator: np.random.Generator) -> Array:
    """`E (r, r)` of slices `E diag(.) F^T (n, r r)`, from the pair of mixtures, of several, that leaves terms of rank 1."""
    mixtures = generator.standard_normal((2 * _PAIRS, len(slices))).astype(slices.dtype)
    mixtures = np.linalg.qr((mixtures @ slices @ slices.T).T)[0].T  # the directions that the slices share
    mixtures = (mixtures @ slices).astype(np.float64)
    first, second = (generator.standard_normal((_PAIRS, 2, len(mixtures))) @ mixtures).reshape(_PAIRS, 2, rank, rank).swapaxes(0, 1)
    square = second @ second.mT
    square += np.eye(rank) * (EXACT * np.trace(square, axis1=1, axis2=2)[:, None, None] + TINY)
    values, vectors = np.linalg.eig(np.linalg.solve(square, second @ first.mT).mT)
    # Of a pair of complex columns, the two directions that it spans.
    vectors = np.where(values.imag[:, None] < 0, vectors.imag, vectors.real)
    rows = mixtures.reshape(-1, rank, rank).transpose(1, 0, 2).reshape(rank, -1)
    terms = (np.linalg.pinv(vectors) @ rows).reshape(_PAIRS, rank, -1, rank)
    inner = terms @ terms.mT
    alike = np.square(inner).sum((2, 3)) / (np.trace(inner, axis1=2, axis2=3) ** 2 + TINY)
    out: Array = vectors[int(alike.mean(1).argmax())]
    return out


def greedy_model(core: Core, rank: int, sweeps: int, effort: Effort, generator: np.random.Generator) -> Model:
    """A start by deflation: search rank-1 terms in what the model leaves, add the best ones, refit all in some `sweeps`, until there are
    `rank`.

    On flat, noise-like spectra (a full fine-tune) this is worth far more than random starts: SmolLM2 at rank 16 reaches 4.6 % of the
    energy from any seed, where the best of 40 random starts stays at 4.2 % and the median at 3.6 %.
    """
    model = pool = random_model(core, 0, generator)
    while (have := len(model[0])) < rank:
        rest = residual_core(core, model) if have else core
        if rest.energy <= EXACT * core.energy:
            return [np.pad(factor, ((0, rank - have), (0, 0))) for factor in model]
        terms, pool = best_terms(rest, pool, rank - have, effort, generator)
        fit, _ = fit_als(core, [np.concatenate(parts) for parts in zip(model, terms, strict=True)], sweeps, 0.0)
        # Columns beyond an exact fit would only cancel each other, so find out whether this is one.
        model = refine(core, fit.model, _PROBE_STEPS).model if fit.loss < _NEARLY * core.energy else fit.model
    return model


def _greedy_within(core: Core, leading: _Leading, rank: int, sweeps: int, generator: np.random.Generator) -> Model:
    """A greedy start within the leading directions, if it holds about as much as they do beyond noise; else of the whole core.

    Less: they are those of other data than a few columns. More: it is noise that is fitted, which is no less elsewhere.
    """
    count, size = leading.basis.shape
    if _WIDTH * rank <= size and leading.signal > _SIGNAL * core.energy:
        parts = zip(leading.projected, core.tensors, strict=True)
        small = Core.of(tuple(torch.from_numpy(y).to(tensor.device).view(count, *tensor.shape[1:]) for y, tensor in parts))
        a, *others = greedy_model(small, rank, sweeps, _QUICK, generator)
        captured = small.energy - residual_core(small, [a, *others]).energy
        if _LEAST * leading.signal <= captured <= _MOST * leading.signal:
            return [a @ leading.basis, *others]
    return greedy_model(core, rank, sweeps, _THOROUGH, generator)


def _algebraic_fit(core: Core, leading: _Leading, rank: int, generator: np.random.Generator) -> CoreFit | None:
    """A fit from the algebraic start, if nothing but noise is left for another one to find.

    No model holds more than the leading directions do. Of white noise they hold the average of the others, so a fit that holds what they
    do beyond it has missed no term of the core; another fit may hold a little more of the noise.
    """
    if rank > min(core.sizes()[:2]) or sum(math.prod(tensor.shape[1:4]) for tensor in core.tensors) == 1:
        return None
    least = leading.held - leading.noise
    # Without any noise to speak of, only a fit of nearly all will do.
    if not leading.full or least <= (1 - _NOISE if leading.noise else 1 - _NEARLY) * core.energy:
        return None
    for _ in range(_ALGEBRAIC):
        fit, left = fit_als(core, _algebraic_model(core, leading, rank, generator))
        if core.energy - fit.loss >= least - _AGREED * core.energy:
            break
    fit = finish(core, fit, left)
    return fit if core.energy - fit.loss >= least - _AGREED * core.energy else None


def fit_core(core: Core, rank: int, starts: int, seed: int) -> CoreFit:
    """The best of at most `starts` fits; greedy starts, but a random one in every third place.

    More starts are for structured data: an exact fit ends the search, so do two alike, and so does one that leaves more than half of
    the energy, as greedy starts on noise-like data end within a few percent of each other. On structured data an algebraic start comes
    before them, and is the only one where it has found all there is.
    """
    with single_thread():
        generator = np.random.default_rng(seed)
        leading = _leading(core, rank, generator)
        fit = _algebraic_fit(core, leading, rank, generator)
    if fit:
        return fit
    fits: list[CoreFit] = []
    for start in range(starts):
        generator = np.random.default_rng(seed + 1_000_003 * start)
        with single_thread():
            sweeps = _REFIT_SWEEPS[min(start, 1)]
            first = random_model(core, rank, generator) if start % 3 == 2 else _greedy_within(core, leading, rank, sweeps, generator)
            fits.append(refine(core, first))
        left = [fit.loss / (core.energy + TINY) for fit in fits]
        agreed = start > 0 and abs(left[-1] - min(left[:-1])) < _AGREED
        if agreed or not EXACT < left[-1] < _NOISE:
            break
    return min(fits, key=lambda fit: fit.loss)
