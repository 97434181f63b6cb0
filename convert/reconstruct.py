"""Changes of weights from the tensors of LoHa, LoKr, Tucker-decomposed convolutions and DoRA. All float32 unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta


def product_of(down: Tensor, up: Tensor, mid: Tensor | None, scale: float) -> LowRankDelta:
    """The change `(out, in * kh * kw)` of a layer whose LoRA is `down (r, in, kh, kw)` and `up (out, r, 1, 1)`, or two matrices.

    With `mid (r, r, kh, kw)` in between (Tucker) `down` is `(r, in, 1, 1)`; the core goes into the second factor.
    """
    if mid is not None:
        down = torch.einsum("mn...,nj->mj...", mid, down.flatten(1))
    return LowRankDelta(up.flatten(1) * scale, down.flatten(1))


def hadamard(tensors: Mapping[str, Tensor]) -> Tensor:
    """LoHa: `(w1_a w1_b) * (w2_a w2_b)`, `(out, in ...)`. With cores `t1`, `t2 (r, r, kh, kw)` the `_a` are `(r, out)`."""
    return _half(tensors, 1) * _half(tensors, 2)


def kronecker(tensors: Mapping[str, Tensor]) -> Tensor:
    """LoKr: the Kronecker product of `w1` and `w2`, each whole or as `_a _b`, with convolution kernels in `w2`: `(out, in * kh * kw)`."""
    w1, w2 = (tensors[name] if (name := f"w{number}") in tensors else _half(tensors, number) for number in (1, 2))
    product: Tensor = torch.kron(w1.contiguous(), w2.flatten(1).contiguous())
    return product


def _half(tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """`w_a w_b` of one number, or with a core `t (r, r, kh, kw)` what that makes of them."""
    a, b = tensors[f"w{number}_a"], tensors[f"w{number}_b"]
    core = tensors.get(f"t{number}")
    return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)


def with_magnitude(weight: Tensor, change: Tensor, magnitude: Tensor, rows: bool, eps: float = 0.0) -> Tensor:
    """DoRA: `m (W + D) / ||W + D|| - W` in float64; the norm is that of each row, or of each column of the stored layout.

    `weight` and `change` are `(out, in)` or `(out, in, kh, kw)`; a column is all that one input channel feeds.
    """
    tuned = weight.double() + change.double().view(weight.shape)
    matrix = tuned.flatten(1) if rows else tuned.transpose(0, 1).flatten(1)
    factor = magnitude.double().flatten() / (torch.linalg.vector_norm(matrix, dim=1) + eps)
    shape = [-1, *[1] * (weight.ndim - 1)] if rows else [1, -1, *[1] * (weight.ndim - 2)]
    change_of_both: Tensor = tuned * factor.view(shape) - weight.double()
    return change_of_both.float()
