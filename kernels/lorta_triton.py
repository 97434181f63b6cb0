"""LoRTA by heads as Triton kernels: neither the delta nor a value per row, head and rank is ever written to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapt_convert.kernels.dispatch import precision_for

_ROWS = 16  # the least that tl.dot takes; decoding has fewer


@triton.jit
def heads_expand_kernel(  # type: ignore[no-untyped-def]
    inner, B, heads, y, rows, rank, head_size, y_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[m, h * d_h + j] += sum_r inner[m, r] heads[h, r] B[j, r]`."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    j = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    left = tl.load(inner + m[:, None] * rank + r[None, :], mask=(m[:, None] < rows) & (r[None, :] < rank), other=0.0).to(tl.float32)
    left *= tl.load(heads + head * rank + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
    right = tl.load(B + j[None, :] * rank + r[:, None], mask=(j[None, :] < head_size) & (r[:, None] < rank), other=0.0).to(tl.float32)
    where = y + m[:, None] * y_width + head * head_size + j[None, :]
    inside = (m[:, None] < rows) & (j[None, :] < head_size)
    old = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, (old + tl.dot(left, right, input_precision=PRECISION)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def heads_shrink_kernel(  # type: ignore[no-untyped-def]
    x, B, heads, inner, rows, rank, head_count, head_size, x_width,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`inner[m, r] = sum_h heads[h, r] sum_j x[m, h * d_h + j] B[j, r]`."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for head in range(head_count):
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(0, head_size, BLOCK_K):
            j = start + k
            inside = (m[:, None] < rows) & (j[None, :] < head_size)
            left = tl.load(x + m[:, None] * x_width + head * head_size + j[None, :], mask=inside, other=0.0).to(tl.float32)
            held = (j[:, None] < head_size) & (r[None, :] < rank)
            right = tl.load(B + j[:, None] * rank + r[None, :], mask=held, other=0.0).to(tl.float32)
            part += tl.dot(left, right, input_precision=PRECISION)
        total += part * tl.load(heads + head * rank + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (r[None, :] < rank)
    tl.store(inner + m[:, None] * rank + r[None, :], total.to(inner.dtype.element_ty), mask=inside)


def lorta_add_triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, heads: Tensor, reads: bool) -> Tensor:
    """`lorta_add` by the kernels; arguments as there. `y` is overwritten and returned."""
    rank, head_count, head_size = A.shape[1], heads.shape[0], B.shape[0]
    flat = x.contiguous().view(-1, x.shape[-1])
    rows, block_r = len(flat), max(16, triton.next_power_of_2(rank))
    B, heads, y = B.contiguous(), heads.contiguous(), y.contiguous()
    if rows == 0:
        return y
    block = max(16, min(64, triton.next_power_of_2(head_size)))
    if reads:
        inner = (flat @ A).contiguous()
        grid = (triton.cdiv(rows, _ROWS), head_count, triton.cdiv(head_size, block))
        heads_expand_kernel[grid](
            inner, B, heads, y, rows, rank, head_size, y.shape[-1], BLOCK_M=_ROWS, BLOCK_N=block, BLOCK_R=block_r,
        PRECISION=precision_for(x.dtype),
        )  # fmt: skip
        return y
    inner = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    heads_shrink_kernel[(triton.cdiv(rows, _ROWS),)](
        flat,
        B,
        heads,
        inner,
        rows,
        rank,
        head_count,
        head_size,
        flat.shape[-1],
        BLOCK_M=_ROWS,
        BLOCK_K=block,
        BLOCK_R=block_r,
        PRECISION=precision_for(x.dtype),
    )
    return y.add_((inner @ A.T).view(y.shape))
