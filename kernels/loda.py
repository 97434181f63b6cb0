"""The forward pass of one LoDA matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from adapt_convert.formats.loda_config import EPSILON, SLOPE


def loda_apply(x: Tensor, A: Tensor, B: Tensor, f1: tuple[Tensor, Tensor] | None = None, f2: Tensor | None = None) -> Tensor:
    """`f(x) = B (z + f1(z)) + f2(B f1(z))` with `z = A x`, for `x (..., in)`; LoDA (MERL TR2025-130).

    `A (r, in)`, `B (out, r)`. `f1(z) = W_out act(W_in z)` with two `(r, r)` matrices, `f2(u) = s * act(u)` with one number `s` for each
    output, `act(u) = LeakyReLU_0.8(LayerNorm(u))`, the norm without parameters. None stands for a function that is zero: without f1
    this is a LoRA, bit for bit.
    """
    z = functional.linear(x, A)
    if f1 is None:
        return functional.linear(z, B)
    inner = functional.linear(_activation(functional.linear(z, f1[0])), f1[1])
    if f2 is None:
        return functional.linear(z + inner, B)
    lifted = functional.linear(inner, B)
    return functional.linear(z, B) + lifted + f2 * _activation(lifted)


def _activation(u: Tensor) -> Tensor:
    return functional.leaky_relu(functional.layer_norm(u, u.shape[-1:], eps=EPSILON), SLOPE)
