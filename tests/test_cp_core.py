"""The core of the CP solver: its products and loss, the algebraic start and the Gauss-Newton steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adapt_convert.convert.lorta import cp_start
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_als import residual_core
from adapt_convert.convert.lorta.cp_core import Core, normals, product_a, random_model
from adapt_convert.convert.lorta.cp_newton import fit_newton
from adapt_convert.convert.lorta.cp_start import fit_core
from adapt_convert.convert.lorta.cp_tensor import CPShape

from .test_cp import as_slabs, planted, tensorly_captured


def test_core_products_against_autograd() -> None:
    """MTTKRP and normal matrix are the derivative of the squared error."""
    generator = torch.Generator().manual_seed(0)
    core = Core.of(tuple(torch.randn(5, m, 3, h, 4, generator=generator, dtype=torch.float64) for m, h in [(2, 3), (1, 2)]))
    plain = random_model(core, 3, np.random.default_rng(0))
    model = [torch.tensor(factor, requires_grad=True) for factor in plain]
    loss = torch.zeros((), dtype=torch.float64)
    for group, tensor in enumerate(core.tensors):
        a, b, c_l, c_h, c_m = (model[n] for n in core.positions(group))
        loss = loss + (tensor - torch.einsum("ra,rm,rl,rh,rj->amlhj", a, c_m, c_l, c_h, b)).square().sum()
    (gradient,) = torch.autograd.grad(loss, [model[0]])
    np.testing.assert_allclose(2 * (normals(core, plain)[0] @ plain[0] - product_a(core, plain)), gradient.numpy())


def test_core_loss_is_the_naive_one() -> None:
    generator = torch.Generator().manual_seed(0)
    core = Core.of(tuple(torch.randn(6, m, 3, h, 4, generator=generator) for m, h in [(2, 3), (1, 2)]))
    fit = fit_core(core, 3, 1, 0)
    assert fit.loss == pytest.approx(residual_core(core, fit.model).energy, rel=1e-5)


@pytest.mark.parametrize(("columns", "noise", "greedy"), [(4, 0.03, False), (4, 0.0, False), (9, 0.0, True), (2, 0.3, True)])
def test_the_algebraic_start_is_trusted_only_if_all_else_is_noise(
    columns: int, noise: float, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where more columns than the rank are left to choose from, nor where columns are left to fit noise; and it is no worse for it."""
    shape = CPShape(60, 12, 5, (3,), (0, 0, 0, 0))
    deltas = planted(shape, columns, 1, noise)
    started = False
    start = cp_start.greedy_model

    def record(*args: Any) -> Any:
        nonlocal started
        started = True
        return start(*args)

    monkeypatch.setattr(cp_start, "greedy_model", record)
    fit = fit_cp(as_slabs(deltas), shape, 4)
    assert started == greedy
    assert 1 - fit.residual / fit.energy >= tensorly_captured(deltas, shape, 4) - 1e-4


def test_the_algebraic_start_is_exact_where_the_core_is() -> None:
    """Without a single step of a solver after it."""
    draw = np.random.default_rng(0)
    shapes = [(12, 2, 4, heads, 6) for heads in (3, 2)]
    a, b, c_l = (draw.standard_normal((4, size)) for size in (12, 6, 4))
    tensors = [np.einsum("ra,rm,rl,rh,rj->amlhj", a, draw.standard_normal((4, 2)), c_l, draw.standard_normal((4, s[3])), b) for s in shapes]
    core = Core.of(tuple(torch.from_numpy(tensor) for tensor in tensors))
    generator = np.random.default_rng(1)
    model = cp_start._algebraic_model(core, cp_start._leading(core, 4, generator), generator)
    assert residual_core(core, model).energy < 1e-15 * core.energy


def test_slices_that_rotate_have_real_directions() -> None:
    """Eigenvectors of a rotation are complex; the two directions that they span are not."""
    turns = [np.array([[np.cos(x), -np.sin(x)], [np.sin(x), np.cos(x)]]) for x in (0.3, 1.1)]
    slices = np.stack([np.block([[turn, np.zeros((2, 1))], [np.zeros((1, 2)), np.ones((1, 1))]]).reshape(-1) for turn in turns])
    found = cp_start._shared_eigenvectors(slices, 3, np.random.default_rng(0))
    assert found.dtype == np.float64
    assert np.linalg.svd(found)[1].min() > 0.1


def test_extrapolated_steps_lead_to_a_stationary_point() -> None:
    """Gauss-Newton on noise alone ends where autograd sees no slope."""
    generator = torch.Generator().manual_seed(1)
    core = Core.of(tuple(torch.randn(12, 2, 4, h, 6, generator=generator, dtype=torch.float64) for h in (3, 2)))
    first = random_model(core, 3, np.random.default_rng(0))
    fit = fit_newton(core, first, 300, 1e-13)
    model = [torch.tensor(factor, requires_grad=True) for factor in fit.model]
    loss = torch.zeros((), dtype=torch.float64)
    for group, tensor in enumerate(core.tensors):
        a, b, c_l, c_h, c_m = (model[n] for n in core.positions(group))
        loss = loss + (tensor - torch.einsum("ra,rm,rl,rh,rj->amlhj", a, c_m, c_l, c_h, b)).square().sum()
    slopes = torch.autograd.grad(loss, model)
    assert fit.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3
