"""The fit of one LoDA matrix, held against bounds that no map of its form can pass and against planted maps."""

from __future__ import annotations

import pytest
import torch

from adapt_convert.convert.delta import DenseDelta, LowRankDelta
from adapt_convert.convert.loda.fit import Activations, error_of, fit_matrix, projected_lora
from adapt_convert.convert.loda.replacement import largest
from adapt_convert.formats.loda import LodaMatrix
from adapt_convert.kernels.loda import loda_apply

OUT, IN, TOKENS = 20, 24, 600


def lumpy(seed: int) -> Activations:
    """Inputs as far from white noise as those of real layers: uneven directions, heavy tails, an offset."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=draw) * torch.exp(torch.randn(TOKENS, 1, generator=draw))
    x = x @ torch.randn(IN, IN, generator=draw) * torch.logspace(0, -2, IN) + torch.randn(IN, generator=draw)
    return Activations(x[: TOKENS * 2 // 3], x[TOKENS * 2 // 3 :])


def change(seed: int = 1) -> DenseDelta:
    return DenseDelta(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("rank", [1, 3, OUT])
def test_the_projection_attains_the_bound_of_all_maps_with_as_few_output_dims(rank: int) -> None:
    """By Eckart and Young no matrix of rank r, so nothing of the form B g(x), comes closer to the outputs than their trailing
    singular values, which LAPACK's SVD yields here."""
    target, activations = change(), lumpy(0)
    found = projected_lora(target, activations.fit, rank, seed=0)
    outputs = activations.fit.double() @ target.weight.double().T
    bound = torch.linalg.svdvals(outputs)[rank:].square().sum()
    error = error_of(LodaMatrix(found.A, found.B), target, activations.fit)
    assert error == pytest.approx(float(bound), rel=1e-4, abs=1e-6 * float(outputs.square().sum()))


def test_no_f1_lowers_the_error_that_the_projection_leaves() -> None:
    """Why a LoDA is written without f1 unless it is refined: trained from here by Adam, all parts at once, it gets nowhere."""
    target, activations = change(), lumpy(0)
    start = projected_lora(target, activations.fit, 4, seed=0)
    least = error_of(LodaMatrix(start.A, start.B), target, activations.fit)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        parts = [start.A.clone(), start.B.clone(), torch.randn(4, 4, generator=draw), 0.1 * torch.randn(4, 4, generator=draw)]
        optimiser = torch.optim.Adam([part.requires_grad_() for part in parts], lr=1e-2)
        x, y = activations.fit, target.matmul(activations.fit.T).T
        for _ in range(150):
            optimiser.zero_grad()
            error = (loda_apply(x, parts[0], parts[1], (parts[2], parts[3])) - y).square().sum()
            error.backward()
            optimiser.step()
            assert error.item() >= least * (1 - 1e-5)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_the_truncated_svd_of_the_same_rank(plus: bool, dtype: torch.dtype, seed: int) -> None:
    target, activations = change(seed), lumpy(seed)
    fit = fit_matrix(target, activations, 4, plus, dtype, seed=0)
    u, s, vt = torch.linalg.svd(target.weight.double())
    y = activations.heldout.double() @ target.weight.double().T
    lora = (y - activations.heldout.double() @ ((u[:, :4] * s[:4]) @ vt[:4]).T).square().sum()
    m = fit.best.matrix
    mine = (y - loda_apply(activations.heldout, m.A, m.B, m.f1, m.f2).double()).square().sum()
    assert float(mine) == pytest.approx(fit.best.error, rel=1e-3)
    assert float(mine) < float(lora)
    assert fit.plain.error == pytest.approx(float(lora), rel=2e-2)  # rounded to dtype, too
    assert fit.energy == pytest.approx(float(y.square().sum()), rel=1e-4)
    assert all(torch.equal(part, part.to(dtype).float()) for part in (m.A, m.B))


def test_the_plain_svd_is_kept_where_the_fitted_text_says_nothing_of_the_other() -> None:
    """Activations of two kinds: what they were fitted to and what is held out have no direction in common."""
    target = DenseDelta(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    fit, heldout = torch.zeros(64, 4), torch.zeros(64, 4)
    draw = torch.Generator().manual_seed(0)
    fit[:, 2:] = torch.randn(64, 2, generator=draw)
    heldout[:, :2] = torch.randn(64, 2, generator=draw)
    for plus in (False, True):
        found = fit_matrix(target, Activations(fit, heldout), 2, plus, torch.float32, seed=0)
        assert found.best is found.plain
        assert found.best.error < 1e-8 * found.energy


def test_a_planted_loda_plus_is_found() -> None:
    """Outputs whose other half follows from the first, though not linearly: one more layer of f2 sees it, no LoRA does."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 4, generator=draw)
    x = torch.cat([z, 0.4 * z.abs()], dim=1) @ torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    target = DenseDelta(torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q.contiguous())
    activations = Activations(x[:2000], x[2000:])
    linear = fit_matrix(target, activations, 4, False, torch.float32, seed=0)
    plus = fit_matrix(target, activations, 4, True, torch.float32, seed=0)
    assert (linear.best.kind, plus.best.kind) == ("projected", "f1+f2")
    assert plus.best.error < 0.6 * linear.best.error


def test_an_exactly_low_rank_change_is_held_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    target = LowRankDelta(torch.randn(OUT, 3, generator=draw), torch.randn(3, IN, generator=draw))
    for rank in (3, 8):
        for plus in (False, True):
            found = fit_matrix(target, lumpy(0), rank, plus, torch.float32, seed=0)
            assert found.best.error <= 1e-10 * found.energy
            assert found.best.matrix.rank == 3


def test_pruning_keeps_the_largest_entries() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0], [0.0, 1.0, -1.0]])
    assert largest(weight, 0.5).tolist() == [[False, True, True], [False, True, False]]
    assert largest(weight, 0.01).sum() == 1
