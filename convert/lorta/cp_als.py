"""CP fit of a small dense core from a given start: alternating least squares, then damped Gauss-Newton (convert/lorta/cp_newton.py).

A sweep needs two products with the core and nothing else of its size: `T W` (W: the Khatri-Rao product of all modes but A) and
`A^T T`, from which the products of all other modes follow cheaply (convert/lorta/cp_core.py).

Source: Kolda and Bader 2009.
"""

from __future__ import annotations

import torch

from adapt_convert.convert.lorta.cp_core import (
    INNER,
    Array,
    Core,
    Model,
    balance,
    contract_b,
    contract_heads,
    khatri_rao,
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
from adapt_convert.convert.lorta.cp_newton import CoreFit, fit_newton

_ALS_SWEEPS, _ALS_TOLERANCE = 40, 1e-5  # tolerance relative to the energy
_NEWTON_STEPS, _NEWTON_TOLERANCE = 150, 2e-6  # tolerance relative to the loss
_CLOSE = 1e-3  # share of the energy left below which the fit goes on in float64


class Sweeper:
    """Updates of one model's factors in turn, each by least squares."""

    def __init__(self, core: Core, model: Model) -> None:
        self.core, self.model = core, list(model)
        self.squares = squares_of(model)

    def update(self, n: int, rhs: Array) -> Array:
        normal = normal_of(self.core, self.squares, n)
        self.model[n] = solve_proximal(rhs, normal, self.model[n])
        self.squares[n] = self.model[n] @ self.model[n].T
        return normal

    def others(self, projected: list[Array]) -> tuple[Array, Array]:
        """A sweep over all factors but A; also the MTTKRP and the normal matrix of the last one, C_l."""
        core, model = self.core, self.model
        self.update(1, product_b(core, model, projected))
        small = contract_b(core, model, projected)
        for group in range(core.groups):
            self.update(3 + group, product_c_h(core, model, small, group))
        rest = contract_heads(model, small)
        for group in range(core.groups):
            self.update(3 + core.groups + group, product_c_m(model, rest, group))
        rhs = product_c_l(core, model, rest)
        return rhs, self.update(2, rhs)

    def sweep(self) -> tuple[Array, Array]:
        """A exactly, then `INNER` sweeps over the other factors on the projected core."""
        self.update(0, product_a(self.core, self.model))
        projected = project(self.core, self.model[0])
        for _ in range(INNER):
            last = self.others(projected)
        return last


def fit_als(core: Core, model: Model, sweeps: int = _ALS_SWEEPS, tolerance: float = _ALS_TOLERANCE) -> tuple[CoreFit, float]:
    """ALS of one model until a sweep gains less than `tolerance` of the energy, or `sweeps` are done.

    Also what is left to gain if the gains go on falling as they did in the last sweeps, geometrically.
    """
    sweeper, losses = Sweeper(core, model), list[float]()
    for _ in range(sweeps):
        losses.append(loss_of(core, *sweeper.sweep(), sweeper.model[2]))
        if len(losses) > 2 and losses[-2] - losses[-1] <= tolerance * core.energy:
            break
    return CoreFit(balance(core, sweeper.model), losses[-1]), _left(losses)


def _left(losses: list[float]) -> float:
    if len(losses) < 3:
        return losses[-1]
    before, last = losses[-3] - losses[-2], losses[-2] - losses[-1]
    return last * last / (before - last) if before > last > 0 else max(last, 0.0)


def residual_core(core: Core, model: Model) -> Core:
    """`T - T~` of one model, a second core of the same size."""
    out = []
    for group, tensor in enumerate(core.tensors):
        rest = torch.addmm(tensor.flatten(1), core.tensor(model[0]).T, khatri_rao(core, model, group), alpha=-1.0)
        out.append(rest.view(tensor.shape))
    return Core.of(tuple(out))


def refine(core: Core, model: Model, steps: int = _NEWTON_STEPS) -> CoreFit:
    """ALS from a model, then `finish`."""
    return finish(core, *fit_als(core, model), steps)


def finish(core: Core, fit: CoreFit, left: float, steps: int = _NEWTON_STEPS) -> CoreFit:
    """Gauss-Newton unless ALS, which would still gain `left`, has converged; in float64 when the fit is close, as a float32 core resolves
    its loss to ~1e-7 of the energy only."""
    if fit.loss >= _CLOSE * core.energy and left > _NEWTON_TOLERANCE * fit.loss:
        fit = fit_newton(core, fit.model, steps, _NEWTON_TOLERANCE)
    if fit.loss < _CLOSE * core.energy:
        fit = fit_newton(core.double(), fit.model, steps, _NEWTON_TOLERANCE)
    return fit
