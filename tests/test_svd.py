"""The truncated SVD against `torch.linalg.svd`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_convert.convert import delta as deltas
from adapt_convert.convert import svd
from adapt_convert.convert.delta import DenseDelta, LowRankDelta, difference, inner_product, residual_energy
from adapt_convert.convert.svd import Factorisation, factorise, factorise_for_energy, fit_left


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def spectrum(values: torch.Tensor) -> torch.Tensor:
    """A matrix `(800, 640)` with these singular values."""
    count = len(values)
    left, right = torch.linalg.qr(random(800, count).double()).Q, torch.linalg.qr(random(640, count).double()).Q
    return (left * values.double() @ right.T).float()


SPECTRA = {
    "flat": random(500, 400),
    "wide": random(150, 900),
    "tall": random(900, 150),
    "low rank": random(500, 6) @ random(6, 400),
    "low rank and noise": random(500, 30) @ random(30, 400) + 3 * random(500, 400),
    "steep": random(500, 400) * torch.logspace(0, -6, 400),
    "one direction": random(500, 1) @ random(1, 400),
    "clustered": torch.linalg.qr(random(500, 400)).Q,
    "tiny scale": 1e-12 * random(300, 200),
    "large scale": 1e12 * random(300, 200),
    "one row": random(1, 300),
    "one number": random(1, 1),
    "bf16 rounding": (random(400, 300).bfloat16().float() - random(400, 300)),
    "outlying column": torch.cat([100 * random(800, 1), random(800, 639)], dim=1),
    "64 alike": spectrum(torch.cat([torch.linspace(1, 0.99, 64), torch.full((300,), 0.3)])),
    "two nearly tie": spectrum(torch.cat([torch.tensor([1.0, 0.9999]), torch.full((300,), 0.02)])),
    "low rank and a trace of noise": random(800, 8) @ random(8, 640) + 0.12 * random(800, 640),
    "power law": spectrum(torch.arange(1, 600) ** -1.0),
    "diagonal": torch.diag(torch.linspace(1, 0.1, 600)).bfloat16().float(),
    "toeplitz": 0.98 ** (torch.arange(480)[:, None] - torch.arange(600)).abs(),
    "an outlying row": random(600, 480) * torch.where(torch.arange(600) == 7, 30.0, 1.0)[:, None],
    "three rows": torch.zeros(700, 600).index_copy(0, torch.tensor([3, 300, 600]), random(3, 600)),
    "a hundred columns": torch.cat([random(700, 100), torch.zeros(700, 500)], dim=1),
}


def rough_products(monkeypatch: pytest.MonkeyPatch, rough: bool) -> None:
    """As on a processor with instructions for bfloat16, or as on one without."""
    monkeypatch.setattr(deltas, "_multiplies_bfloat16", lambda device: rough)


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16, 64, 10**6])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_of_the_full_svd(monkeypatch: pytest.MonkeyPatch, name: str, rank: int, rough: bool) -> None:
    rough_products(monkeypatch, rough)
    delta = DenseDelta(SPECTRA[name])
    best = torch.linalg.svdvals(delta.weight.double())
    factors = factorise(delta, rank, generator()).truncate(rank)
    captured = 1 - residual_energy(delta, factors) / delta.energy()
    optimum = float(best[:rank].square().sum() / best.square().sum())
    assert captured >= (0.998 if name == "64 alike" else 0.9999) * optimum  # of those any one is nearly as good as another
    assert captured <= optimum + 1e-6
    assert factors.rank <= min(rank, *delta.shape)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_with_the_best_left_factor_for_directions_of_rough_products(monkeypatch: pytest.MonkeyPatch, name: str, rank: int) -> None:
    rough_products(monkeypatch, True)
    delta = DenseDelta(SPECTRA[name])
    best = torch.linalg.svdvals(delta.weight.double())
    found = factorise(delta, rank, generator(), exact=False).truncate(rank)
    A = found.A.bfloat16().float()
    B, _ = fit_left(delta, LowRankDelta(found.B, A))
    missed = float((delta.weight.double() - B.double() @ A.double()).square().sum())
    optimum = float(best[:rank].square().sum() / best.square().sum())
    assert 1 - missed / float(best.square().sum()) >= (0.998 if name == "64 alike" else 0.9998) * optimum


def test_few_changed_rows_take_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exhausted row space settles, and does not end in a Gram matrix."""
    monkeypatch.setattr(svd, "_from_gram", lambda *_: pytest.fail("the Gram matrix was formed"))
    delta = DenseDelta(SPECTRA["three rows"])
    assert len(factorise(delta, 4, generator()).values) == 3


@pytest.mark.parametrize("rough", [False, True])
def test_krylov_path_is_taken_and_agrees(monkeypatch: pytest.MonkeyPatch, rough: bool) -> None:
    monkeypatch.setattr(svd, "_from_gram", lambda *_: pytest.fail("the exact path was taken"))
    rough_products(monkeypatch, rough)
    delta = DenseDelta(random(1200, 20) @ random(20, 1100) + 0.5 * random(1200, 1100))
    values = factorise(delta, 12, generator()).values
    torch.testing.assert_close(values, torch.linalg.svdvals(delta.weight.double())[:12], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["flat", "low rank", "low rank and noise", "steep", "wide"])
def test_the_best_left_factor(name: str) -> None:
    """Least squares by `torch.linalg.lstsq`; what is missed, told from the product and from the difference."""
    weight = SPECTRA[name].double()
    delta, A = DenseDelta(SPECTRA[name]), random(5, SPECTRA[name].shape[1]).bfloat16().float()
    B, product = fit_left(delta, LowRankDelta(torch.zeros(len(weight), 5), A))
    torch.testing.assert_close(B.double(), torch.linalg.lstsq(A.double().T, weight.T).solution.T, rtol=1e-4, atol=1e-5)
    written = LowRankDelta(B.bfloat16().float(), A)
    missed = float((weight - written.B.double() @ A.double()).square().sum())
    for inner in (None, inner_product(product, written.B)):
        assert residual_energy(delta, written, inner) == pytest.approx(missed, rel=1e-5)


def test_a_left_factor_for_rows_that_nearly_depend_on_each_other() -> None:
    """As right vectors of singular values near rounding do: the others must not suffer."""
    delta = DenseDelta(SPECTRA["low rank"])
    found = factorise(delta, 6, generator()).truncate(6)
    A = torch.cat([found.A, 1e-5 * (found.A[:3] + 1e-4 * random(3, 400))])
    B, _ = fit_left(delta, LowRankDelta(torch.cat([found.B, torch.zeros(500, 3)], dim=1), A))
    assert residual_energy(delta, LowRankDelta(B, A)) < 1e-11 * delta.energy()


def test_a_left_factor_for_rows_that_vanished_in_rounding() -> None:
    delta, A = DenseDelta(SPECTRA["flat"]), torch.cat([random(2, 400), torch.zeros(1, 400)])
    B, _ = fit_left(delta, LowRankDelta(torch.zeros(500, 3), A))
    assert torch.isfinite(B).all()
    assert (B[:, 2] == 0).all()


def test_what_nearly_nothing_misses_is_measured_exactly() -> None:
    """The sums of float32 products say it to some 1e-7 of the energy; here a billionth is missed."""
    best = LowRankDelta(random(90, 8), random(8, 70))
    delta = DenseDelta(best.dense() + 3e-5 * random(90, 70) * best.dense().norm() / random(90, 70).norm())
    missed = float((delta.weight.double() - best.B.double() @ best.A.double()).square().sum())
    assert missed < 1e-8 * delta.energy()
    inner = inner_product(delta.matmul(best.A.T), best.B)
    assert residual_energy(delta, best, inner) == pytest.approx(missed, rel=1e-3)


def test_a_change_of_low_rank_is_recovered_to_float32_where_products_are_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    rough_products(monkeypatch, True)
    delta = DenseDelta(random(1200, 8) @ random(8, 1100))
    assert residual_energy(delta, factorise(delta, 8, generator()).truncate(8)) < 1e-11 * delta.energy()


@pytest.mark.parametrize("transposed", [False, True])
def test_rough_products(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """Rounded twice, from the memory that is lent for them; as they are where the processor gains nothing."""
    weight, spare = random(90, 70), torch.zeros(90 * 70, dtype=torch.bfloat16)
    exact = DenseDelta(weight, spare).T if transposed else DenseDelta(weight, spare)
    rough_products(monkeypatch, False)
    assert exact.rough() is exact
    rough_products(monkeypatch, True)
    faint = DenseDelta(1e-20 * weight)
    assert faint.rough() is faint
    rough = exact.rough()
    rows, columns = exact.shape
    right, left = random(columns, 5), random(rows, 5)
    for found, expected, bound in (
        (rough.matmul(right), exact.weight.double() @ right.double(), exact.weight.abs() @ right.abs()),
        (rough.rmatmul(left), exact.weight.double().T @ left.double(), exact.weight.T.abs() @ left.abs()),
    ):
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= 2**-8 * bound + 2**-8 * expected.abs()).all()
        assert not torch.equal(found, expected.float())
    assert torch.equal(spare.view(90, 70), weight.bfloat16()) is not transposed


@pytest.mark.parametrize("rank", [3, 8, 50])
def test_factored_delta_needs_no_product(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    delta = LowRankDelta(random(90, 8), random(8, 70))
    product = delta.dense()
    monkeypatch.setattr(LowRankDelta, "dense", lambda self: pytest.fail("the product was formed"))
    factors = factorise(delta, rank, generator()).truncate(rank)
    u, s, vt = torch.linalg.svd(product.double())
    expected = (u[:, :rank] * s[:rank] @ vt[:rank]).float() if rank < 8 else product
    torch.testing.assert_close(factors.B @ factors.A, expected, rtol=1e-4, atol=1e-4)
    assert factors.rank == min(rank, 8)
    assert residual_energy(delta, factors) == pytest.approx(float(s[rank:8].square().sum()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("name", ["flat", "low rank", "low rank and noise", "steep", "one row"])
def test_least_rank_for_an_energy(name: str, share: float) -> None:
    delta = DenseDelta(SPECTRA[name])
    factorisation, rank = factorise_for_energy(delta, share, generator())
    captured = 1 - residual_energy(delta, factorisation.truncate(rank)) / delta.energy()
    assert captured >= share - 2e-6
    energies = torch.linalg.svdvals(delta.weight.double()).square()
    if share < 1:  # what one rank less captures at the very best
        assert float(energies[: rank - 1].sum() / energies.sum()) < share


def test_one_factorisation_serves_every_smaller_rank() -> None:
    delta = DenseDelta(SPECTRA["steep"])
    wide = factorise(delta, 40, generator())
    for rank in (1, 7, 40):
        once = factorise(delta, rank, generator()).truncate(rank)
        assert residual_energy(delta, wide.truncate(rank)) == pytest.approx(residual_energy(delta, once), rel=1e-3, abs=1e-9)


def test_same_seed_same_bytes() -> None:
    def run() -> Factorisation:
        return factorise(DenseDelta(SPECTRA["flat"]), 16, generator())

    first, second = run(), run()
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(0, 40), st.integers(0, 2**31))
def test_any_shape_and_rank(rows: int, columns: int, rank: int, true_rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, max(true_rank, 1), generator=draw) @ torch.randn(max(true_rank, 1), columns, generator=draw)
    delta = DenseDelta(weight)
    factors = factorise(delta, rank, generator()).truncate(rank)
    best = torch.linalg.svdvals(weight.double()).square()
    assert factors.B.isfinite().all()
    assert factors.A.isfinite().all()
    assert residual_energy(delta, factors) <= float(best[rank:].sum()) + 1e-5 * float(best.sum())


def test_a_difference_of_scalars_and_of_grown_tables() -> None:
    assert difference(torch.tensor(2.5, dtype=torch.bfloat16), torch.tensor(1.0)) == 1.5
    grown = difference(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0]]))
    assert grown.tolist() == [[2.0], [4.0]]
