"""Damped Gauss-Newton for the CP fit of a core: what ALS leaves undone where columns are nearly alike.

Sources: Tomasi and Bro 2006; Sorber, Van Barel and De Lathauwer 2013 (`J^T J` is applied in closed form and its block diagonal, the
normal matrices of ALS, preconditions conjugate gradients).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.lorta.cp_core import (
    EXACT,
    TINY,
    Core,
    Model,
    balance,
    contract_b,
    loss_of,
    normal_of,
    product_a,
    product_b,
    product_c,
    project,
    solve_proximal,
    squares_of,
)

_CG_STEPS = 30
_CG_TOLERANCE = 0.05  # inexact Newton: the direction need not be better than the model it minimises


@dataclass(frozen=True)
class CoreFit:
    """One model `(1, r, size)`, and its squared error on the core, no finer than ~1e-7 of the energy in a float32 core."""

    model: Model
    loss: float


class _System:
    """`J^T J + mu I` at one model, applied in closed form, and its block-diagonal preconditioner.

    Steps and gradients are flat, `(r, n)` with the columns of all factors side by side: one call for all where that is possible.
    """

    def __init__(self, core: Core, model: Model) -> None:
        self.core, self.model = core, [factor[0] for factor in model]
        self.sizes = [factor.shape[1] for factor in self.model]
        squares = squares_of(model)
        self.normals = [normal_of(core, squares, n)[0] for n in range(len(model))]
        self.pairs = torch.zeros(len(model), len(model), *squares[0].shape[1:], dtype=torch.float64, device=squares[0].device)
        for group in range(core.groups):
            places = core.positions(group)
            for n, m in itertools.combinations(places, 2):
                first, second, third = (squares[place][0] for place in places if place not in (n, m))
                self.pairs[n, m] += first * second * third
                self.pairs[m, n] = self.pairs[n, m]

    def parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector, self.sizes, dim=1)

    def apply(self, step: Tensor, mu: float) -> Tensor:
        parts = self.parts(step)
        cross = torch.stack([factor @ part.T for part, factor in zip(parts, self.model, strict=True)])
        mixed = (self.pairs * cross).sum(1)
        blocks = zip(parts, self.normals, self.model, mixed, strict=True)
        out = torch.cat([torch.addmm(normal @ part, mix, factor) for part, normal, factor, mix in blocks], dim=1)
        return out.add_(step, alpha=mu)

    def direction(self, gradient: Tensor, mu: float) -> Tensor:
        """Preconditioned conjugate gradients for `(J^T J + mu I) s = -gradient`."""
        eye = torch.eye(len(gradient), dtype=torch.float64, device=gradient.device)
        inverse = torch.linalg.inv(torch.stack(self.normals) + mu * eye)

        def condition(vector: Tensor) -> Tensor:
            return torch.cat([own @ part for own, part in zip(inverse, self.parts(vector), strict=True)], dim=1)

        step, residual = torch.zeros_like(gradient), -gradient
        z = condition(residual)
        p, rho = z, _dot(residual, z)
        stop = _CG_TOLERANCE**2 * rho
        for _ in range(_CG_STEPS):
            if not rho > stop:
                break
            image = self.apply(p, mu)
            alpha = rho / _dot(p, image)
            step = step.add(p, alpha=alpha)
            residual = residual.sub(image, alpha=alpha)
            z = condition(residual)
            fresh = _dot(residual, z)
            p, rho = z.add(p, alpha=fresh / rho), fresh
        return step


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _gradient(core: Core, model: Model, rhs_a: Tensor, normal: list[Tensor]) -> Tensor:
    projected = project(core, model[0])
    small = contract_b(core, model, projected)
    rhs = [rhs_a, product_b(core, model, projected)] + [product_c(core, model, small, n) for n in range(2, len(model))]
    return torch.cat([n @ factor[0] - r[0] for factor, n, r in zip(model, normal, rhs, strict=True)], dim=1)


def _solve_a(core: Core, model: Model) -> tuple[Model, float, Tensor]:
    """Replace A by its optimum for the other factors; also the loss there and the product it came from."""
    rhs, normal = product_a(core, model), normal_of(core, squares_of(model), 0)
    a = solve_proximal(rhs, normal, model[0])
    return [a, *model[1:]], float(loss_of(core, rhs, normal, a)), rhs


def fit_newton(core: Core, model: Model, iterations: int, tolerance: float) -> CoreFit:
    """Levenberg-Marquardt, with A re-solved after every step (its product is at hand), until a step gains < `tolerance` of the loss."""
    model, loss, rhs = _solve_a(core, balance(core, model))
    system = _System(core, model)
    gradient = _gradient(core, model, rhs, system.normals)
    mu, growth = 1e-3 * max(float(n.diagonal().max()) for n in system.normals) + TINY, 2.0
    for _ in range(iterations):
        step = system.direction(gradient, mu)
        predicted = -_dot(gradient, step) - 0.5 * _dot(step, system.apply(step, 0.0))
        moved = [factor + part for factor, part in zip(model, system.parts(step), strict=True)]
        trial, new, trial_rhs = _solve_a(core, moved)
        ratio = 0.5 * (loss - new) / predicted if predicted > 0 else -1.0
        if new < loss:
            gain, loss, model, rhs = loss - new, new, trial, trial_rhs
            mu, growth = mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
            if gain <= tolerance * loss or loss <= EXACT * core.energy:
                break
            system = _System(core, model)
            gradient = _gradient(core, model, rhs, system.normals)
        else:
            mu, growth = mu * growth, growth * 2
            if growth > 2**12:
                break
    return CoreFit(balance(core, model), loss)
