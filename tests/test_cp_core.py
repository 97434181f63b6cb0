"""The core of the CP solver: its products and loss, the algebraic start, the Gauss-Newton steps, and one thread for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from adapt_convert.convert.lorta import cp_newton, cp_start
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_als import fit_als, residual_core
from adapt_convert.convert.lorta.cp_core import Core, Model, normals, product_a, random_model
from adapt_convert.convert.lorta.cp_newton import fit_newton
from adapt_convert.convert.lorta.cp_start import fit_core
from adapt_convert.convert.lorta.cp_tensor import CPShape

from .test_cp import as_slabs, gaussian, planted, tensorly_captured


def squared_error(core: Core, model: list[torch.Tensor]) -> torch.Tensor:
    """`||T - T~||^2`, T~ written out."""
    loss = torch.zeros((), dtype=torch.float64)
    for group, tensor in enumerate(core.tensors):
        a, b, c_l, c_h, c_m = (model[n] for n in core.positions(group))
        loss = loss + (tensor - torch.einsum("ra,rm,rl,rh,rj->amlhj", a, c_m, c_l, c_h, b)).square().sum()
    return loss


def test_core_products_against_autograd() -> None:
    """MTTKRP and normal matrix are the derivative of the squared error."""
    generator = torch.Generator().manual_seed(0)
    core = Core.of(tuple(torch.randn(5, m, 3, h, 4, generator=generator, dtype=torch.float64) for m, h in [(2, 3), (1, 2)]))
    plain = random_model(core, 3, np.random.default_rng(0))
    model = [torch.tensor(factor, requires_grad=True) for factor in plain]
    (gradient,) = torch.autograd.grad(squared_error(core, model), [model[0]])
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
    model = cp_start._algebraic_model(core, cp_start._leading(core, 4, generator), 4, generator)
    assert residual_core(core, model).energy < 1e-15 * core.energy


@pytest.mark.parametrize("seed", [1, 2, 8, 11])
def test_a_core_without_a_best_fit_is_no_error(seed: int) -> None:
    """Of rank 3, but approached by models of rank 2 whose columns cancel each other (de Silva and Lim 2008): they start all but equal."""
    draw = np.random.default_rng(seed)
    (a, b), (c, d) = (np.linalg.qr(draw.standard_normal((size, 2)))[0].T for size in (4, 4))
    e, f = np.eye(2)
    tensor = sum(np.einsum("a,l,j->alj", *term) for term in ((a, e, d), (a, f, c), (b, e, c)))
    core = Core.of((torch.tensor(tensor, dtype=torch.float32).view(4, 1, 2, 1, 4),))
    assert fit_core(core, 2, 1, 0).loss < 0.1 * core.energy


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
    loss = squared_error(core, model)
    slopes = torch.autograd.grad(loss, model)
    assert fit.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3


def test_extrapolated_steps_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than plain ones, on noise alone, where the curvature that Gauss-Newton leaves out matters."""
    steps, solve = 0, cp_newton._solve_a

    def count(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return solve(*args)

    def steps_of_all() -> int:
        nonlocal steps
        steps = 0
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            core = Core.of(tuple(torch.randn(24, 2, 6, h, 8, generator=generator) for h in (4, 2)))
            fit, _ = fit_als(core, random_model(core, 6, np.random.default_rng(seed)), 10, 0.0)
            fit_newton(core, fit.model, 500, 2e-6)
        return steps

    monkeypatch.setattr(cp_newton, "_solve_a", count)
    extrapolated = steps_of_all()
    monkeypatch.setattr(cp_newton, "_extrapolated", lambda step, moves, changes: step)
    assert extrapolated < 0.6 * steps_of_all()


def test_an_unlucky_pair_of_slices_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The algebraic start goes on from other slices where ALS gets stuck."""
    shape = CPShape(60, 12, 5, (3,), (0, 0, 0, 0))
    start, starts = cp_start._algebraic_model, 0

    def unlucky(core: Core, leading: Any, rank: int, generator: np.random.Generator) -> Model:
        nonlocal starts
        starts += 1
        model = start(core, leading, rank, generator)
        return model if starts > 1 else [np.repeat(factor[:1], rank, axis=0) for factor in model]  # one column, again and again

    def no_greedy(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(cp_start, "_algebraic_model", unlucky)
    monkeypatch.setattr(cp_start, "greedy_model", no_greedy)
    deltas = planted(shape, 4, 1, 0.03)
    fit = fit_cp(as_slabs(deltas), shape, 4)
    assert starts == 2
    assert 1 - fit.residual / fit.energy >= tensorly_captured(deltas, shape, 4) - 1e-4


def test_searches_within_the_leading_directions_lose_nothing_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than the rank: as good as searches of the whole core. Of noise alone the whole core is searched."""
    shape = CPShape(192, 16, 8, (6,), (0, 0, 0))
    sizes: list[int] = []
    start = cp_start.greedy_model

    def record(core: Core, *args: Any) -> Any:
        sizes.append(core.sizes()[0])
        return start(core, *args)

    monkeypatch.setattr(cp_start, "greedy_model", record)
    slabs = as_slabs(planted(shape, 12, 1, 0.5))
    quick = fit_cp(slabs, shape, 4)
    assert sizes == [12]
    fit_cp(as_slabs(gaussian(shape, 1)), shape, 4)
    assert sizes == [12, 192]
    monkeypatch.setattr(cp_start, "_SIGNAL", 1.0)
    thorough = fit_cp(slabs, shape, 4)
    assert quick.energy - quick.residual >= 0.999 * (thorough.energy - thorough.residual)


_FIT = """
import hashlib, torch
from adapt_convert.convert.delta import DenseDelta
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPShape, Slab
torch.set_num_threads(1)
shape = CPShape(512, 64, 3, (4, 2), (0, 1, 1, 0))
draw = torch.Generator().manual_seed(0)
left, right = torch.randn(512, 72, generator=draw), torch.randn(72, 256, generator=draw)
def load(layer, matrix):
    mixed = (left * torch.randn(72, generator=draw)) @ right[:, :shape.columns(matrix)]
    delta = DenseDelta(mixed + 20 * torch.randn(mixed.shape, generator=draw))
    return lambda: delta
slabs = [Slab(layer, matrix, load(layer, matrix)) for layer in range(3) for matrix in range(4)]
factors = fit_cp(slabs, shape, 64, starts=1, polish=1).factors
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in (factors.A, factors.B, *factors.C_h, factors.C_l, factors.C_m))).hexdigest())
"""


def test_same_bytes_whatever_the_threads_of_blas() -> None:
    """Those of NumPy and SciPy count from the environment when they are loaded."""
    found = {}
    for threads in "12":
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads}
        found[threads] = subprocess.run([sys.executable, "-c", _FIT], env=environment, capture_output=True, text=True, check=True).stdout
    assert len(found["1"].strip()) == 64
    assert found["1"] == found["2"]
