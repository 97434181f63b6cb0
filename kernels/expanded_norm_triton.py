"""`expanded_norm` as one Triton kernel: a row is read twice (three times behind a LayerNorm) and written once, float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapt_convert.kernels.expanded_norm import NormShape

_BLOCK = 1024  # channels at a time
_KINDS = {"rms": 0, "gemma": 1, "layer": 2}


@triton.jit
def expanded_norm_kernel(  # type: ignore[no-untyped-def]
    x, gain, bias, signs, keeps, out, rows_per_factor, d, width, x_stride, eps,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * width overflows 32 bits from 2^31 elements on
    x += row * x_stride
    out += row * width
    signs += (row // rows_per_factor) * width
    keeps += (row // rows_per_factor) * width
    block = tl.arange(0, BLOCK)
    mean = 0.0
    if KIND == 2:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            total += tl.load(x + start + block, mask=start + block < d, other=0.0).to(tl.float32)
        mean = tl.sum(total) / d
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        channel = start + block
        value = tl.load(x + channel, mask=channel < width, other=0.0).to(tl.float32) - tl.where(channel < d, mean, 0.0)
        total += value * value * tl.load(signs + channel, mask=channel < width, other=0.0)
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(total), 0.0) / d + eps)
    for start in range(0, width, BLOCK):
        channel = start + block
        inside = channel < width
        y = (tl.load(x + channel, mask=inside, other=0.0).to(tl.float32) - tl.where(channel < d, mean, 0.0)) * scale
        g = tl.load(gain + channel, mask=inside, other=0.0)
        if KIND == 0:  # Llama's order: round, then multiply by the gain in the model's dtype
            y = y.to(out.dtype.element_ty).to(tl.float32) * g.to(out.dtype.element_ty).to(tl.float32)
        else:
            y *= g.to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        if MASKED:
            y *= tl.load(keeps + channel, mask=inside, other=0.0)
        tl.store(out + channel, y.to(out.dtype.element_ty), mask=inside)


def expanded_norm_triton(x: Tensor, gain: Tensor, bias: Tensor | None, signs: Tensor, keeps: Tensor | None, shape: NormShape) -> Tensor:
    """`expanded_norm` by the kernel; arguments as there."""
    x, signs = x.contiguous(), signs.contiguous()
    rows = x.numel() // max(1, shape.width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    expanded_norm_kernel[(rows,)](
        x, gain, x if bias is None else bias, signs, signs if keeps is None else keeps.contiguous(), out,
        rows // len(signs), shape.d, shape.width, shape.width, shape.eps,
        KIND=_KINDS[shape.kind], HAS_BIAS=bias is not None, MASKED=keeps is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(shape.width)),
    )  # fmt: skip
    return out
