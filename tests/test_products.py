"""Products with a large matrix are those of torch, by whichever of its kernels they go."""

from __future__ import annotations

import pytest
import torch

from adapt_convert.convert import products
from adapt_convert.convert.products import times, transposed_times

SHAPES = [(1024, 1040), (1040, 1024), (2064, 2048), (1030, 1024), (64, 96), (16, 70000), (70000, 16)]


@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("columns", [0, 1, 16, 33, 64, 65])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_both_products(
    shape: tuple[int, int], columns: int, dtype: torch.dtype, accuracy: float, convolves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices and columns that are stored row after row, or column after column."""
    monkeypatch.setattr(products, "_convolves", lambda: convolves)
    draw = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=draw).to(dtype)
    right = torch.randn(shape[1], columns, generator=draw).to(dtype)
    left = torch.randn(shape[0], columns, generator=draw).to(dtype)
    for product, W, x in ((times, weight, right), (transposed_times, weight, left)):
        expected = (W if product is times else W.T).double() @ x.double()
        for stored in (W, W.T.contiguous().T):
            for block in (x, x.T.contiguous().T):
                got = product(stored, block)
                assert got.dtype == dtype
                assert got.shape == expected.shape
                assert (got.double() - expected).norm() <= accuracy * expected.norm()


def test_large_matrices_go_through_convolutions_where_the_processor_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("conv2d", "conv2d_weight"):
        original = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
    x = torch.randn(1024, 4)
    for gains in (False, True):
        monkeypatch.setattr(products, "_convolves", lambda gains=gains: gains)
        for product in (times, transposed_times):
            assert product(torch.eye(1024), x).equal(x)
            assert product(torch.eye(1024).T, x).equal(x)
            assert product(torch.eye(1008, 1008), x[:1008]).equal(x[:1008])  # too small
            assert product(torch.eye(1032, 1032), torch.cat([x, x[:8]]))[:1024].equal(x)  # no whole number of images
    assert calls == ["conv2d", "conv2d_weight", "conv2d_weight", "conv2d"]
