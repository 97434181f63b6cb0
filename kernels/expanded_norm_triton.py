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
    x, gain, bias, mask, out, rows_per_mask, d, rank, x_width, out_width, eps,
    TASKS: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * width overflows 32 bits from 2^31 elements on
    x += row * x_width
    out += row * out_width
    channels = tl.arange(0, BLOCK)
    mean = 0.0
    if KIND == 2:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, d, BLOCK):
            total += tl.load(x + start + channels, mask=start + channels < d, other=0.0).to(tl.float32)
        mean = tl.sum(total) / d
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        inside = start + channels < d
        h = tl.load(x + start + channels, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(inside, h - mean, 0.0)
        total += h * h

    dims = tl.arange(0, BLOCK_R)
    held = dims < rank
    w = tl.load(x + d + dims, mask=held, other=0.0).to(tl.float32)
    mask += (row // rows_per_mask) * TASKS
    if TASKS == 1:
        t = tl.load(x + d + rank + dims, mask=held, other=0.0).to(tl.float32)
        if MASKED:
            own = tl.load(mask).to(tl.float32)
            w *= own
            t *= own
    else:
        t = tl.zeros([BLOCK_R], tl.float32)
        for task in range(TASKS):
            part = tl.load(x + d + (1 + task) * rank + dims, mask=held, other=0.0).to(tl.float32)
            t += part * tl.load(mask + task).to(tl.float32)
    square = tl.sum(total) + tl.sum(t * (2.0 * w + t))
    scale = 1.0 / tl.sqrt(tl.maximum(square, 0.0) / d + eps)

    for start in range(0, d, BLOCK):
        inside = start + channels < d
        h = tl.load(x + start + channels, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gain + start + channels, mask=inside, other=0.0)
        y = (h - mean) * scale
        if KIND == 0:  # Llama's order: round, then multiply by the gain in the model's dtype
            y = y.to(out.dtype.element_ty).to(tl.float32) * g.to(out.dtype.element_ty).to(tl.float32)
        else:
            y *= g.to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + start + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + start + channels, y.to(out.dtype.element_ty), mask=inside)
    out += d
    if TASKS == 1:
        tl.store(out + dims, (w * scale).to(out.dtype.element_ty), mask=held)
    else:
        for task in range(TASKS):
            own = tl.load(mask + task).to(tl.float32)
            tl.store(out + task * rank + dims, ((w + t) * own * scale).to(out.dtype.element_ty), mask=held)
    tl.store(out + TASKS * rank + dims, (t * scale).to(out.dtype.element_ty), mask=held)


def expanded_norm_triton(x: Tensor, gain: Tensor, bias: Tensor | None, mask: Tensor | None, shape: NormShape) -> Tensor:
    """`expanded_norm` by the kernel; arguments as there."""
    x = x.contiguous()
    rows = x.numel() // max(1, x.shape[-1])
    out = torch.empty(*x.shape[:-1], shape.width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    masks = x if mask is None else mask.contiguous()  # never read without a mask
    expanded_norm_kernel[(rows,)](
        x, gain, x if bias is None else bias, masks, out,
        rows if mask is None else rows // len(mask), shape.d, shape.rank, x.shape[-1], shape.width, shape.eps,
        TASKS=shape.tasks, KIND=_KINDS[shape.kind], HAS_BIAS=bias is not None, MASKED=mask is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(shape.d)), BLOCK_R=triton.next_power_of_2(max(1, shape.rank)),
    )  # fmt: skip
    return out
