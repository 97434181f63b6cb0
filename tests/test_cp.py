"""The CP solver against tensorly, planted tensors, and an error computed by forming the whole tensor."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta
from adapt_convert.convert.lorta import cp_stream
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_core import Core
from adapt_convert.convert.lorta.cp_tensor import CPFactors, CPFit, CPShape, Slab

Deltas = dict[tuple[int, int], Delta]

GQA = CPShape(d=72, d_h=12, layers=5, heads=(6, 2), group=(0, 1, 1, 0))
EQUAL = CPShape(d=24, d_h=6, layers=4, heads=(3,), group=(0, 0, 0, 0))
MLP = CPShape(d=40, d_h=300, layers=3, heads=(1,), group=(0, 0, 0))


def planted(shape: CPShape, rank: int, seed: int, noise: float = 0.0) -> Deltas:
    """Sum of `rank` random terms, written out from the formula of the paper, plus Gaussian noise of that share of its size."""
    rng = np.random.default_rng(seed)
    a, b, c_l, c_m = (rng.standard_normal((n, rank)) for n in (shape.d, shape.d_h, shape.layers, len(shape.group)))
    c_h = [rng.standard_normal((heads, rank)) for heads in shape.heads]
    out: Deltas = {}
    for layer in range(shape.layers):
        for matrix, group in enumerate(shape.group):
            blocks = [a @ np.diag(c_h[group][h] * c_l[layer] * c_m[matrix]) @ b.T for h in range(shape.heads[group])]
            x = np.concatenate(blocks, axis=1)
            x = x + noise * np.sqrt(rank) * rng.standard_normal(x.shape)
            out[layer, matrix] = DenseDelta(torch.tensor(x, dtype=torch.float32))
    return out


def gaussian(shape: CPShape, seed: int) -> Deltas:
    generator = torch.Generator().manual_seed(seed)
    places = [(layer, matrix) for layer in range(shape.layers) for matrix in range(len(shape.group))]
    return {(l_, m): DenseDelta(torch.randn(shape.d, shape.columns(m), generator=generator)) for l_, m in places}


def as_slabs(deltas: Deltas) -> list[Slab]:
    def loader(delta: Delta) -> Callable[[], Delta]:
        return lambda: delta

    return [Slab(layer, matrix, loader(delta)) for (layer, matrix), delta in deltas.items()]


def rebuilt(factors: CPFactors, shape: CPShape) -> dict[tuple[int, int], np.ndarray]:
    """Every approximation in float64 from tensorly's `cp_to_tensor`, as `(d, heads * d_h)`."""
    out = {}
    for group in range(len(shape.heads)):
        members = shape.members(group)
        parts = [factors.A, factors.C_h[group], factors.B, factors.C_l, factors.C_m[members]]
        tensor = tensorly.cp_to_tensor((np.ones(factors.rank), [part.double().numpy() for part in parts]))
        for place, matrix in enumerate(members):
            for layer in range(shape.layers):
                out[layer, matrix] = tensor[..., layer, place].reshape(shape.d, -1)
    return out


def naive_residual(deltas: Deltas, factors: CPFactors, shape: CPShape) -> float:
    total = 0.0
    for place, approximation in rebuilt(factors, shape).items():
        x = deltas[place].dense().double().numpy() if place in deltas else 0.0
        total += float(((x - approximation) ** 2).sum())
    return total


def energy(deltas: Deltas) -> float:
    return sum(float(delta.dense().double().square().sum()) for delta in deltas.values())


def all_tensors(factors: CPFactors) -> list[Tensor]:
    return [factors.A, factors.B, *factors.C_h, factors.C_l, factors.C_m]


def assert_sound(fit: CPFit, deltas: Deltas, shape: CPShape, rank: int) -> None:
    """Shapes, finite numbers, and both reported sums against the naive ones."""
    sizes = [shape.d, shape.d_h, *shape.heads, shape.layers, len(shape.group)]
    assert [tuple(t.shape) for t in all_tensors(fit.factors)] == [(size, rank) for size in sizes]
    assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in all_tensors(fit.factors))
    total = energy(deltas)
    assert fit.energy == pytest.approx(total, rel=1e-6)
    assert fit.residual == pytest.approx(naive_residual(deltas, fit.factors, shape), rel=1e-5, abs=1e-11 * total)
    assert fit.residual <= total * (1 + 1e-6)


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors would be fitted without compression: take that choice away."""
    monkeypatch.setattr(cp_stream, "_CORE_FLOATS", 0)


def tensorly_captured(deltas: Deltas, shape: CPShape, rank: int, starts: int = 5) -> float:
    """The best of `starts` of tensorly's fits; equal head counts only."""
    tensor = np.zeros((shape.d, shape.heads[0], shape.d_h, shape.layers, len(shape.group)))
    for (layer, matrix), delta in deltas.items():
        tensor[..., layer, matrix] = delta.dense().numpy().reshape(shape.d, shape.heads[0], shape.d_h)
    best = 0.0
    for init, seed in [("svd", 0), ("random", 0), ("random", 1), ("random", 2), ("random", 3)][:starts]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of small modes and of convergence
            found = parafac(tensor, rank, n_iter_max=200, init=init, tol=1e-8, random_state=seed)
        best = max(best, 1 - float(((tensor - tensorly.cp_to_tensor(found)) ** 2).sum() / (tensor**2).sum()))
    return best


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("kind", ["flat", "structured", "exact"])
def test_no_worse_than_tensorly(kind: str, rank: int) -> None:
    deltas = gaussian(EQUAL, 1) if kind == "flat" else planted(EQUAL, 4, 1, noise=0.5 if kind == "structured" else 0.0)
    fit = fit_cp(as_slabs(deltas), EQUAL, rank)
    assert 1 - fit.residual / fit.energy >= tensorly_captured(deltas, EQUAL, rank) - 1e-4


@pytest.mark.usefixtures("compressed")
@pytest.mark.parametrize("noise", [2.0, None])
def test_no_worse_than_tensorly_where_most_is_noise(noise: float | None) -> None:
    """Polishing makes up for a basis that a flat spectrum does not fit into: 64 of 160 directions."""
    shape = CPShape(160, 8, 4, (3,), (0, 0, 0))
    deltas = gaussian(shape, 1) if noise is None else planted(shape, 8, 1, noise)
    fit = fit_cp(as_slabs(deltas), shape, 4)
    assert fit.passes > 4
    assert 1 - fit.residual / fit.energy >= tensorly_captured(deltas, shape, 4, starts=1)


@pytest.mark.parametrize("seed", range(8))
def test_recovers_a_planted_grouped_query_tensor(seed: int) -> None:
    deltas = planted(GQA, 4, seed)
    fit = fit_cp(as_slabs(deltas), GQA, 4, seed=seed)
    assert fit.residual <= 1e-10 * fit.energy
    assert_sound(fit, deltas, GQA, 4)


@pytest.mark.usefixtures("compressed")
@pytest.mark.parametrize("shape", [GQA, CPShape(600, 8, 3, (4, 2), (0, 1, 0)), CPShape(80, 300, 2, (1,), (0, 0, 0))])
def test_recovers_through_every_kind_of_basis(shape: CPShape) -> None:
    """A Gram matrix (d = 72), a sketch (d = 600) and bases of both sides (d_h = 300) all hold an exact tensor."""
    deltas = planted(shape, 4, 5)
    fit = fit_cp(as_slabs(deltas), shape, 4)
    assert 1 - fit.residual / fit.energy >= 1 - 1e-9
    assert_sound(fit, deltas, shape, 4)


@pytest.mark.usefixtures("compressed")
def test_polishing_leaves_the_first_basis() -> None:
    """Where the sketch is too small for a flat spectrum, the polish gains and the result is near the uncompressed fit."""
    shape = CPShape(256, 16, 4, (4, 2), (0, 1, 1, 0))
    slabs = as_slabs(planted(shape, 6, 3, noise=3.0))
    rough, fine = fit_cp(slabs, shape, 6, polish=0), fit_cp(slabs, shape, 6)
    assert fine.residual < rough.residual
    cp_stream._CORE_FLOATS = 2**22  # restored by the fixture
    full = fit_cp(slabs, shape, 6)
    assert full.energy - fine.residual >= 0.99 * (full.energy - full.residual)
    assert fine.passes <= 8


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1.0])
def test_the_residual_is_exact(noise: float) -> None:
    """Also of a near-exact fit, where `||X||^2 - 2 <X, X~> + ||X~||^2` would have no digit left."""
    deltas = planted(GQA, 3, 2, noise)
    fit = fit_cp(as_slabs(deltas), GQA, 3)
    expected = naive_residual(deltas, fit.factors, GQA)
    assert fit.residual == pytest.approx(expected, rel=1e-5, abs=1e-13 * fit.energy)
    assert fit.passes == 1  # a tensor this small is its own core


def test_slab_is_the_formula() -> None:
    fit = fit_cp(as_slabs(planted(GQA, 3, 4, 0.3)), GQA, 3)
    for (layer, matrix), expected in rebuilt(fit.factors, GQA).items():
        np.testing.assert_allclose(fit.factors.slab(GQA.group, layer, matrix).dense().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_factored_deltas_give_the_fit_of_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    factored: Deltas = {
        place: LowRankDelta(torch.randn(GQA.d, 2, generator=generator), torch.randn(2, GQA.columns(place[1]), generator=generator))
        for place in gaussian(GQA, 0)
    }
    dense: Deltas = {place: DenseDelta(delta.dense()) for place, delta in factored.items()}
    left, right = (fit_cp(as_slabs(deltas), GQA, 4) for deltas in (factored, dense))
    assert left.residual == pytest.approx(right.residual, rel=1e-3)
    assert_sound(left, dense, GQA, 4)


def test_canonical_form() -> None:
    factors = fit_cp(as_slabs(planted(GQA, 4, 6, 0.2)), GQA, 4).factors
    norms = torch.stack([t.double().norm(dim=0) for t in all_tensors(factors)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-5, atol=0.0)
    assert bool((norms[0].diff() <= 0).all())
    for factor in all_tensors(factors)[:-1]:
        assert bool((factor.gather(0, factor.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("make", [gaussian, lambda shape, seed: planted(shape, 3, seed, 0.1)], ids=["noise", "planted"])
@pytest.mark.parametrize("shape", [GQA, MLP])
def test_same_seed_same_bytes(shape: CPShape, make: Callable[[CPShape, int], Deltas]) -> None:
    deltas = make(shape, 3)
    first, second = (fit_cp(as_slabs(deltas), shape, 3, seed=11) for _ in range(2))
    assert first.residual == second.residual
    for left, right in zip(all_tensors(first.factors), all_tensors(second.factors), strict=True):
        assert left.numpy().tobytes() == right.numpy().tobytes()


def _some_zero() -> Deltas:
    deltas = gaussian(GQA, 5)
    for place in [(0, 0), (2, 1), (4, 3)]:
        deltas[place] = DenseDelta(torch.zeros(deltas[place].shape))
    return deltas


def _without(deltas: Deltas, dropped: Callable[[int, int], bool]) -> Deltas:
    return {place: delta for place, delta in deltas.items() if not dropped(*place)}


ONE_LAYER = CPShape(20, 5, 1, (4, 2), (0, 1, 1, 0))
ONE_HEAD = CPShape(20, 8, 3, (1,), (0, 0, 0))
SMALL = CPShape(6, 3, 2, (2, 1), (0, 1, 0))
ALL_ONE = CPShape(1, 1, 1, (1,), (0,))

DEGENERATE: dict[str, tuple[Deltas, CPShape, int]] = {
    "rank above the data's": (planted(GQA, 2, 0), GQA, 7),
    "rank above every size": (gaussian(SMALL, 0), SMALL, 8),
    "rank one": (gaussian(GQA, 1), GQA, 1),
    "zero slabs": (_some_zero(), GQA, 3),
    "missing slabs": (_without(gaussian(GQA, 2), lambda layer, matrix: layer == matrix), GQA, 3),
    "missing group": (_without(planted(GQA, 2, 3), lambda layer, matrix: matrix in (1, 2)), GQA, 2),
    "all zero": ({place: DenseDelta(torch.zeros(delta.shape)) for place, delta in gaussian(GQA, 0).items()}, GQA, 3),
    "no slab": ({}, GQA, 2),
    "one layer": (gaussian(ONE_LAYER, 3), ONE_LAYER, 3),
    "one head": (gaussian(ONE_HEAD, 4), ONE_HEAD, 3),
    "wide channels": (gaussian(MLP, 5), MLP, 2),
    "one number": (gaussian(ALL_ONE, 6), ALL_ONE, 2),
    "tiny numbers": ({place: DenseDelta(delta.dense() * 1e-12) for place, delta in gaussian(GQA, 7).items()}, GQA, 2),
    "large numbers": ({place: DenseDelta(delta.dense() * 1e8) for place, delta in gaussian(GQA, 8).items()}, GQA, 2),
    "rank-1 slab, twice the same head": (planted(ONE_HEAD, 1, 9), ONE_HEAD, 4),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("floats", [0, 2**22], ids=["compressed", "whole"])
def test_degenerate(name: str, floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp_stream, "_CORE_FLOATS", floats)
    deltas, shape, rank = DEGENERATE[name]
    assert_sound(fit_cp(as_slabs(deltas), shape, rank), deltas, shape, rank)


def test_scale_does_not_matter() -> None:
    deltas = gaussian(GQA, 7)
    small = {place: DenseDelta(delta.dense() * 2.0**-40) for place, delta in deltas.items()}
    left, right = fit_cp(as_slabs(deltas), GQA, 2), fit_cp(as_slabs(small), GQA, 2)
    assert left.residual / left.energy == pytest.approx(right.residual / right.energy, rel=1e-6)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.data())
def test_any_shape_and_rank(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    heads = tuple(data.draw(st.lists(small, min_size=1, max_size=2), "heads"))
    group = [*range(len(heads)), *data.draw(st.lists(st.integers(0, len(heads) - 1), max_size=2), "group")]
    d, d_h = data.draw(st.integers(1, 30), "d"), data.draw(st.integers(1, 6), "d_h")
    shape = CPShape(d, d_h, data.draw(small, "layers"), heads, tuple(group))
    rank = data.draw(st.integers(1, 6), "rank")
    deltas = gaussian(shape, data.draw(st.integers(0, 9), "seed"))
    assert_sound(fit_cp(as_slabs(deltas), shape, rank), deltas, shape, rank)


@pytest.mark.usefixtures("compressed")
def test_no_more_deltas_are_alive_than_threads_work_on() -> None:
    """The 5-way tensor is never formed: each loaded matrix is let go, and the cores are far smaller than the tensor."""
    shape = CPShape(512, 8, 4, (4,), (0, 0, 0))
    live: list[weakref.ref[Tensor]] = []
    most, lock = 0, threading.Lock()

    def load(seed: int) -> Delta:
        nonlocal most
        weight = torch.randn(512, 32, generator=torch.Generator().manual_seed(seed))
        with lock:
            live.append(weakref.ref(weight))
            most = max(most, sum(ref() is not None for ref in live))
        return DenseDelta(weight)

    def loader(seed: int) -> Callable[[], Delta]:
        return lambda: load(seed)

    fit = fit_cp([Slab(n // 3, n % 3, loader(n)) for n in range(12)], shape, 2, polish=2)
    assert most <= torch.get_num_threads() + 1
    assert len(live) == 12 * fit.passes
    assert fit.passes <= 8


@pytest.mark.usefixtures("compressed")
def test_the_core_is_far_smaller_than_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = CPShape(1024, 600, 2, (1,), (0, 0))
    largest = 0
    make = Core.of

    def record(tensors: tuple[Tensor, ...]) -> Core:
        nonlocal largest
        largest = max(largest, sum(t.numel() for t in tensors))
        return make(tensors)

    monkeypatch.setattr(Core, "of", staticmethod(record))
    fit_cp(as_slabs(gaussian(shape, 0)), shape, 2)
    assert 0 < largest <= 1024 * 600 * 4 / 50


def test_progress_names_every_pass() -> None:
    lines: list[str] = []

    def progress(items: Any, what: str) -> Any:
        lines.append(what)
        return items

    fit = fit_cp(as_slabs(gaussian(GQA, 0)), GQA, 2, progress=progress)
    assert [line.split(":")[0] for line in lines] == [f"pass {n + 1}" for n in range(fit.passes)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 5}, "outside of"),
        ({"matrix": 4}, "outside of"),
        ({"layer": 1}, "two slabs"),
        ({"load": lambda: DenseDelta(torch.zeros(3, 3))}, "layer 0, matrix 0: shape"),
    ],
)
def test_bad_slabs(change: dict[str, object], message: str) -> None:
    slabs = as_slabs(gaussian(GQA, 0))
    slabs[0] = Slab(**{**vars(slabs[0]), **change})
    with pytest.raises(ValueError, match=message):
        fit_cp(slabs, GQA, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [3, 16])
def test_deltas_that_are_not_finite(value: float, rank: int) -> None:
    deltas = gaussian(GQA, 0)
    deltas[1, 1].dense()[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        fit_cp(as_slabs(deltas), GQA, rank)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        fit_cp([], GQA, 0)
    with pytest.raises(ValueError, match="starts must be at least 1"):
        fit_cp([], GQA, 1, starts=0)
    with pytest.raises(ValueError, match="at least 1"):
        CPShape(4, 4, 0, (1,), (0,))
    with pytest.raises(ValueError, match="group must name"):
        CPShape(4, 4, 1, (1, 2), (0, 0))


def test_inner_product_of_two_cp_tensors() -> None:
    draw = torch.Generator().manual_seed(0)

    def factors(rank: int) -> CPFactors:
        a, b, c_l, c_m = (torch.randn(n, rank, generator=draw) for n in (GQA.d, GQA.d_h, GQA.layers, len(GQA.group)))
        return CPFactors(a, b, tuple(torch.randn(heads, rank, generator=draw) for heads in GQA.heads), c_l, c_m)

    left, right = factors(3), factors(2)
    formed = [rebuilt(left, GQA), rebuilt(right, GQA)]
    expected = sum(float((formed[0][place] * formed[1][place]).sum()) for place in formed[0])
    assert left.inner(right, GQA.group) == pytest.approx(expected, rel=1e-5)
