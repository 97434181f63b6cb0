"""Products with a large matrix are those of torch, by whichever of its kernels they go."""

from __future__ import annotations

import pytest
import torch

from adapt_convert.convert import products
from adapt_convert.convert.products import times, transposed_times

SHAPES = [(1024, 1040), (1040, 1024), (1030, 1024), (64, 96), (16, 70000), (70000, 16)]


@pytest.mark.parametrize("columns", [1, 16, 33, 64, 65])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
def test_both_products(shape: tuple[int, int], columns: int, dtype: torch.dtype, accuracy: float) -> None:
    draw = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=draw).to(dtype)
    right = torch.randn(shape[1], columns, generator=draw).to(dtype)
    left = torch.randn(columns, shape[0], generator=draw).to(dtype).T  # stored column after column, as bases are
    for got, expected in (
        (times(weight, right), weight.double() @ right.double()),
        (times(weight, right.T.contiguous().T), weight.double() @ right.double()),
        (transposed_times(weight, left), weight.double().T @ left.double()),
        (transposed_times(weight, left.contiguous()), weight.double().T @ left.double()),
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= accuracy * expected.norm()


def test_large_matrices_go_through_convolutions_where_the_processor_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    original = products.conv2d
    monkeypatch.setattr(products, "conv2d", lambda images, kernels: calls.append(images.shape) or original(images, kernels))
    for gains in (False, True):
        monkeypatch.setattr(products, "_convolves", lambda gains=gains: gains)
        x = torch.randn(1024, 4)
        assert times(torch.eye(1024), x).equal(x)
        assert times(torch.eye(1008, 1024), x).equal(x[:1008])  # too small
        assert times(torch.eye(1032, 1024), x)[:1024].equal(x)  # no whole number of images
    assert calls == [(16, 1024, 64, 1)]
