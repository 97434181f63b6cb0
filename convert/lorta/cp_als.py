"""CP fit of a small dense core: a greedy start, alternating least squares, then damped Gauss-Newton (convert/lorta/cp_newton.py).

A sweep needs two products with the core and nothing else of its size: `T W` (W: the Khatri-Rao product of all modes but A) and
`A^T T`, from which the products of all other modes follow cheaply (convert/lorta/cp_core.py).

Source: Kolda and Bader 2009 (ALS; deflation by rank-1 terms).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_convert.convert.lorta.cp_core import (
    EXACT,
    TINY,
    Core,
    Model,
    balance,
    contract_b,
    khatri_rao,
    loss_of,
    normal_of,
    product_a,
    product_b,
    product_c,
    project,
    random_model,
    solve_proximal,
    squares_of,
    sum_of,
)
from adapt_convert.convert.lorta.cp_newton import CoreFit, fit_newton
from adapt_convert.convert.side_by_side import single_thread

_INNER = 2  # cheap sweeps over B and the C factors per product with the core
_SEARCHES = 64  # rank-1 searches side by side in each round of the greedy start
_SEARCH_SWEEPS = 4
_SHARE = 0.9  # a round adds the terms that explain at least this share of what its best one explains
_REFIT_SWEEPS = 3
_ALIKE = 0.1  # cosine above which two rank-1 terms count as one
_ALS_SWEEPS, _ALS_TOLERANCE = 40, 1e-5  # tolerance relative to the energy
_NEWTON_STEPS, _NEWTON_TOLERANCE = 150, 1e-6  # tolerance relative to the loss
_NEARLY = 0.03  # share of the energy left below which a greedy start looks for an exact fit before it adds columns
_PROBE_STEPS = 40  # Newton steps of that look
_CLOSE = 0.1  # share of the energy left below which the fit goes on in float64
_AGREED = 1e-4  # share of the energy: two starts this close have found the same fit
_NOISE = 0.5  # share of the energy left above which one start is enough


def als_sweep(core: Core, model: Model) -> tuple[Model, Tensor]:
    """One sweep of all models: A exactly, then `_INNER` sweeps over the other factors on the projected core; also the losses `(s,)`."""
    model = list(model)
    squares = squares_of(model)

    def update(n: int, rhs: Tensor) -> Tensor:
        normal = normal_of(core, squares, n)
        model[n] = solve_proximal(rhs, normal, model[n])
        squares[n] = model[n] @ model[n].mT
        return normal

    update(0, product_a(core, model))
    projected = project(core, model[0])
    for _ in range(_INNER):
        update(1, product_b(core, model, projected))
        small = contract_b(core, model, projected)
        for n in range(len(model) - 1, 1, -1):
            rhs = product_c(core, model, small, n)
            normal = update(n, rhs)
    return model, loss_of(core, rhs, normal, model[2])


def fit_als(core: Core, model: Model, sweeps: int, tolerance: float) -> CoreFit:
    """ALS of one model until a sweep gains less than `tolerance` of the energy, or `sweeps` are done."""
    loss = core.energy
    for sweep in range(sweeps):
        model, losses = als_sweep(core, model)
        gain, loss = loss - float(losses), float(losses)
        if gain <= tolerance * core.energy and sweep:
            break
    return CoreFit(balance(core, model), loss)


def residual_core(core: Core, model: Model) -> Core:
    """`T - T~` of one model, a second core of the same size."""
    out = []
    for group, tensor in enumerate(core.tensors):
        rest = torch.addmm(tensor.flatten(1), model[0][0].T.to(core.dtype), khatri_rao(core, model, group), alpha=-1.0)
        out.append(rest.view(tensor.shape))
    return Core.of(tuple(out))


def _distinct(core: Core, model: Model, losses: Tensor, most: int) -> Tensor:
    """Which of many rank-1 models explain most of the core, best first, no two of them alike."""
    squares = squares_of([factor.transpose(0, 1) for factor in model])
    inner = sum_of([torch.stack([squares[n][0] for n in core.positions(group)]).prod(0) for group in range(core.groups)])
    length = inner.diagonal().sqrt() + TINY
    same = ((inner / length / length[:, None]).abs() > _ALIKE).tolist()
    chosen: list[int] = []
    for index in losses.argsort(stable=True).tolist():
        if len(chosen) < most and not any(same[index][other] for other in chosen):
            chosen.append(index)
    return torch.tensor(chosen, device=losses.device)


def _search(core: Core, pool: Model, most: int, generator: torch.Generator) -> tuple[Model, Model]:
    """The best rank-1 terms of a core, as one model of at most `most` columns, and the other distinct ones found.

    Searches start side by side from the pool that the last search left and from random terms.
    """
    searches = max(_SEARCHES, 4 * most)
    pool = [factor[: searches // 2] for factor in pool]
    fresh = random_model(core, searches - len(pool[0]), 1, generator)
    model = [torch.cat(parts) for parts in zip(pool, fresh, strict=True)]
    for _ in range(_SEARCH_SWEEPS):
        model, losses = als_sweep(core, model)
    kept = _distinct(core, model, losses, max(_SEARCHES // 2, 2 * most))
    explained = core.energy - losses[kept]
    good = explained >= _SHARE * explained[0]
    good[most:] = False
    return [factor[kept[good]].transpose(0, 1) for factor in model], [factor[kept[~good]] for factor in model]


def greedy_model(core: Core, rank: int, generator: torch.Generator) -> Model:
    """A start by deflation: search rank-1 terms in what the model leaves, add the best ones, refit all, until there are `rank`.

    On flat, noise-like spectra (a full fine-tune) this is worth far more than random starts: SmolLM2 at rank 16 reaches 4.6 % of the
    energy from any seed, where the best of 40 random starts stays at 4.2 % and the median at 3.6 %.
    """
    pool = random_model(core, 0, 1, generator)
    model = [factor.transpose(0, 1) for factor in pool]
    while (have := model[0].shape[1]) < rank:
        rest = residual_core(core, model) if have else core
        if rest.energy <= EXACT * core.energy:
            return [torch.nn.functional.pad(factor, (0, 0, 0, rank - have)) for factor in model]
        terms, pool = _search(rest, pool, rank - have, generator)
        fit = fit_als(core, [torch.cat(parts, dim=1) for parts in zip(model, terms, strict=True)], _REFIT_SWEEPS, 0.0)
        # Columns beyond an exact fit would only cancel each other, so find out whether this is one.
        model = refine(core, fit.model, _PROBE_STEPS).model if fit.loss < _NEARLY * core.energy else fit.model
    return model


def refine(core: Core, model: Model, steps: int = _NEWTON_STEPS) -> CoreFit:
    """ALS, then Gauss-Newton; in float64 when the fit is close, as a float32 core resolves its loss to ~1e-7 of the energy only."""
    fit = fit_als(core, model, _ALS_SWEEPS, _ALS_TOLERANCE)
    if fit.loss >= _CLOSE * core.energy:
        fit = fit_newton(core, fit.model, steps, _NEWTON_TOLERANCE)
    if fit.loss < _CLOSE * core.energy:
        fit = fit_newton(core.double(), fit.model, steps, _NEWTON_TOLERANCE)
    return fit


def fit_core(core: Core, rank: int, starts: int, seed: int) -> CoreFit:
    """The best of at most `starts` fits; greedy starts, but a random one in every third place.

    More starts are for structured data: an exact fit ends the search, so do two alike, and so does one that leaves more than half of
    the energy, as greedy starts on noise-like data end within a percent of each other.
    """
    if starts < 1:
        raise ValueError(f"fit_core: starts must be at least 1, got {starts}")
    fits: list[CoreFit] = []
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * start)
        with single_thread():
            first = random_model(core, 1, rank, generator) if start % 3 == 2 else greedy_model(core, rank, generator)
            fits.append(refine(core, first))
        left = [fit.loss / (core.energy + TINY) for fit in fits]
        agreed = start > 0 and abs(left[-1] - min(left[:-1])) < _AGREED
        if agreed or not EXACT < left[-1] < _NOISE:
            break
    return min(fits, key=lambda fit: fit.loss)
