"""Damped Gauss-Newton for the CP fit of a core: what ALS leaves undone where columns are nearly alike.

Sources: Tomasi and Bro 2006; Sorber, Van Barel and De Lathauwer 2013 (`J^T J` is applied in closed form and its block diagonal, the
normal matrices of ALS, preconditions conjugate gradients).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from adapt_convert.convert.lorta.cp_core import (
    EXACT,
    TINY,
    Array,
    Core,
    Model,
    balance,
    contract_b,
    contract_heads,
    loss_of,
    normal_of,
    product_a,
    product_b,
    product_c_h,
    product_c_l,
    product_c_m,
    project,
    solve_proximal,
    squares_of,
)

_CG_STEPS = 30
_DEPTH = 3  # steps that an extrapolation looks back
_CG_TOLERANCE = 0.05  # inexact Newton: the direction need not be better than the model it minimises


@dataclass(frozen=True)
class CoreFit:
    """A model and its squared error on the core, no finer than ~1e-7 of the energy in a float32 core."""

    model: Model
    loss: float


class _System:
    """`J^T J + mu I` at one model, applied in closed form, and its block-diagonal preconditioner.

    Steps and gradients are flat, `(r, n)` with the columns of all factors side by side: one call for all where that is possible.
    """

    def __init__(self, core: Core, model: Model) -> None:
        self.core, self.model = core, model
        stops = itertools.accumulate((factor.shape[1] for factor in model), initial=0)
        self.places = [slice(*pair) for pair in itertools.pairwise(stops)]
        squares = squares_of(model)
        self.normals = [normal_of(core, squares, n) for n in range(len(model))]
        self.pairs = np.zeros((len(model), len(model), *squares[0].shape))
        for group in range(core.groups):
            places = core.positions(group)
            for n, m in itertools.combinations(places, 2):
                first, second, third = (squares[place] for place in places if place not in (n, m))
                self.pairs[n, m] += first * second * third
                self.pairs[m, n] = self.pairs[n, m]

    def parts(self, vector: Array) -> list[Array]:
        return [vector[:, place] for place in self.places]

    def apply(self, step: Array, mu: float) -> Array:
        parts = self.parts(step)
        cross = np.stack([factor @ part.T for part, factor in zip(parts, self.model, strict=True)])
        mixed = (self.pairs * cross).sum(1)
        blocks = zip(parts, self.normals, self.model, mixed, strict=True)
        return np.concatenate([normal @ part + mix @ factor for part, normal, factor, mix in blocks], axis=1) + mu * step

    def direction(self, gradient: Array, mu: float) -> Array:
        """Preconditioned conjugate gradients for `(J^T J + mu I) s = -gradient`."""
        inverse = np.linalg.inv(np.stack(self.normals) + mu * np.eye(len(gradient)))

        def condition(vector: Array) -> Array:
            return np.concatenate([own @ part for own, part in zip(inverse, self.parts(vector), strict=True)], axis=1)

        step, residual = np.zeros_like(gradient), -gradient
        z = condition(residual)
        p, rho = z, float(np.vdot(residual, z))
        stop = _CG_TOLERANCE**2 * rho
        for _ in range(_CG_STEPS):
            if not rho > stop:
                break
            image = self.apply(p, mu)
            alpha = rho / float(np.vdot(p, image))
            step = step + alpha * p
            residual = residual - alpha * image
            z = condition(residual)
            fresh = float(np.vdot(residual, z))
            p, rho = z + (fresh / rho) * p, fresh
        return step


def _gradient(core: Core, model: Model, rhs_a: Array, normals: list[Array]) -> Array:
    projected = project(core, model[0])
    small = contract_b(core, model, projected)
    rest = contract_heads(model, small)
    groups = range(core.groups)
    heads, matrices = [product_c_h(core, model, small, g) for g in groups], [product_c_m(model, rest, g) for g in groups]
    rhs = [rhs_a, product_b(core, model, projected), product_c_l(core, model, rest), *heads, *matrices]
    return np.concatenate([n @ factor - r for factor, n, r in zip(model, normals, rhs, strict=True)], axis=1)


def _solve_a(core: Core, model: Model) -> tuple[Model, float, Array]:
    """Replace A by its optimum for the other factors; also the loss there and the product it came from."""
    rhs, normal = product_a(core, model), normal_of(core, squares_of(model), 0)
    a = solve_proximal(rhs, normal, model[0])
    return [a, *model[1:]], loss_of(core, rhs, normal, a), rhs


def _extrapolated(step: Array, moves: list[Array], changes: list[Array]) -> Array:
    """Anderson's step: where the mixture of the last points leads whose own step would be the shortest, were steps linear in the point."""
    if not moves:
        return step
    rows = np.stack([change.ravel() for change in changes])
    weights = np.linalg.lstsq(rows @ rows.T, rows @ step.ravel(), rcond=None)[0]
    out: Array = step - np.tensordot(weights, np.stack(moves) + np.stack(changes), axes=1)
    return out


def fit_newton(core: Core, model: Model, iterations: int, tolerance: float) -> CoreFit:
    """Levenberg-Marquardt, with A re-solved after every step (its product is at hand), until a step gains < `tolerance` of the loss.

    Where much is left unexplained, `J^T J` is not all of the curvature and steps fall short by a constant factor, so they are
    extrapolated (Walker and Ni 2011), unless that would go uphill.
    """
    model, loss, rhs = _solve_a(core, balance(core, model))
    system = _System(core, model)
    gradient = _gradient(core, model, rhs, system.normals)
    mu, growth = 1e-3 * max(float(n.diagonal().max()) for n in system.normals) + TINY, 2.0
    moves, changes, before = list[Array](), list[Array](), None
    for _ in range(iterations):
        step = system.direction(gradient, mu)
        if before is not None:
            changes = [*changes, step - before][-_DEPTH:]
        before = step
        move = _extrapolated(step, moves, changes)
        predicted = -float(np.vdot(gradient, step)) - 0.5 * float(np.vdot(step, system.apply(step, 0.0)))
        moved = [factor + part for factor, part in zip(model, system.parts(move), strict=True)]
        trial, new, trial_rhs = _solve_a(core, moved)
        if moves and not new < loss:
            moves, changes = [], []
            moved = [factor + part for factor, part in zip(model, system.parts(step), strict=True)]
            trial, new, trial_rhs = _solve_a(core, moved)
        if new < loss:
            ratio = 0.5 * (loss - new) / predicted if predicted > 0 else -1.0
            moves = [*moves, np.concatenate(trial, axis=1) - np.concatenate(model, axis=1)][-_DEPTH:]
            gain, loss, model, rhs = loss - new, new, trial, trial_rhs
            mu, growth = mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
            if gain <= tolerance * loss or loss <= EXACT * core.energy:
                break
            system = _System(core, model)
            gradient = _gradient(core, model, rhs, system.normals)
        else:
            mu, growth = mu * growth, growth * 2
            before = None
            if growth > 2**12:
                break
    return CoreFit(balance(core, model), loss)
