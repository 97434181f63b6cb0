"""The polishing passes of the CP solver, the residual that it reports, and the same bytes from any number of threads."""

from __future__ import annotations

import pytest
import torch

from adapt_convert.convert.lorta import cp, cp_stream
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPShape

from .test_cp import GQA, all_tensors, as_slabs, gaussian, naive_residual, planted


@pytest.mark.parametrize("seed", [1, 2])
def test_the_basis_holds_the_factor_before(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of polishing are conjugate gradients: on a flat spectrum they take far fewer passes than steepest descent, to the same fit."""
    shape = CPShape(160, 8, 4, (3,), (0, 0, 0))
    monkeypatch.setattr(cp_stream, "_CORE_FLOATS", 0)
    slabs, span = as_slabs(gaussian(shape, seed)), cp._span
    fit = fit_cp(slabs, shape, 4)
    monkeypatch.setattr(cp, "_span", lambda factor, better, *older: span(factor, better))
    plain = fit_cp(slabs, shape, 4)
    assert fit.passes <= 0.75 * plain.passes
    assert fit.energy - fit.residual >= 0.999 * (plain.energy - plain.residual)


@pytest.mark.parametrize("noise", [0.02, 0.1, 1.0])
def test_the_residual_of_a_compressed_fit_is_exact(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a pass measures it or the products of the last one tell it."""
    shape = CPShape(160, 8, 4, (4, 2), (0, 1, 0))
    deltas = {(layer, matrix): delta for (layer, matrix), delta in planted(shape, 4, 1, noise).items() if layer != matrix}
    monkeypatch.setattr(cp_stream, "_CORE_FLOATS", 0)
    fit = fit_cp(as_slabs(deltas), shape, 4)
    assert fit.passes > 1
    assert fit.residual == pytest.approx(naive_residual(deltas, fit.factors, shape), rel=1e-5)


@pytest.mark.parametrize("seed", [2, 3])
def test_the_residual_of_a_near_exact_fit_has_its_digits(seed: int) -> None:
    """A share of 1e-10 of the energy, which float32 sums would miss by some 1e-5 of it."""
    deltas = planted(GQA, 3, seed, 1e-5)
    fit = fit_cp(as_slabs(deltas), GQA, 3)
    assert 0 < fit.residual < 1e-9 * fit.energy
    assert fit.residual == pytest.approx(naive_residual(deltas, fit.factors, GQA), rel=1e-9)


def test_same_bytes_whatever_the_threads_of_torch() -> None:
    """Also of bases of both sides, which are found between passes."""
    shape = CPShape(96, 600, 12, (1,), (0, 0, 0, 0))
    slabs, before = as_slabs(planted(shape, 24, 1, 0.5)), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append([factor.numpy().tobytes() for factor in all_tensors(fit_cp(slabs, shape, 16).factors)])
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]
