"""`grouped_lora_add` as two Triton kernels, shrink and expand; no adapter is copied for its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapt_convert.kernels.dispatch import precision_for

_TOKENS = 16  # the least that tl.dot takes; decoding has one
_BLOCK = 64


@triton.jit
def grouped_shrink_kernel(  # type: ignore[no-untyped-def]
    x, A, ids, inner, tokens, rank, width,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`inner[i, m, :] = A[ids[i] - 1] x[i, m, :]`, zeros where there is no adapter."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    task = tl.load(ids + row).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if task > 0:
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (m[:, None] < tokens) & (k[None, :] < width)
            left = tl.load(x + (row * tokens + m[:, None]) * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
            held = (r[None, :] < rank) & (k[:, None] < width)
            right = tl.load(A + ((task - 1) * rank + r[None, :]) * width + k[:, None], mask=held, other=0.0).to(tl.float32)
            total += tl.dot(left, right, input_precision=PRECISION)
    inside = (m[:, None] < tokens) & (r[None, :] < rank)
    tl.store(inner + (row * tokens + m[:, None]) * rank + r[None, :], total, mask=inside)


@triton.jit
def grouped_expand_kernel(  # type: ignore[no-untyped-def]
    inner, B, ids, y, tokens, rank, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[i, m, :] += B[ids[i] - 1] inner[i, m, :]`; rows without an adapter are not touched."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    task = tl.load(ids + row).to(tl.int64)
    if task > 0:
        held = (m[:, None] < tokens) & (r[None, :] < rank)
        left = tl.load(inner + (row * tokens + m[:, None]) * rank + r[None, :], mask=held, other=0.0)
        held = (n[None, :] < width) & (r[:, None] < rank)
        right = tl.load(B + ((task - 1) * width + n[None, :]) * rank + r[:, None], mask=held, other=0.0).to(tl.float32)
        where = y + (row * tokens + m[:, None]) * width + n[None, :]
        inside = (m[:, None] < tokens) & (n[None, :] < width)
        old = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        tl.store(where, (old + tl.dot(left, right, input_precision=PRECISION)).to(y.dtype.element_ty), mask=inside)


def grouped_lora_add_triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    """`grouped_lora_add` by the kernels; arguments as there. `y` is overwritten and returned, where it is contiguous."""
    x, y, A, B = x.contiguous(), y.contiguous(), A.contiguous(), B.contiguous()
    rows, rank = len(x), A.shape[1]
    tokens = x.numel() // max(1, rows * x.shape[-1])
    if rows == 0 or tokens == 0:
        return y
    inner = torch.empty(rows, tokens, rank, dtype=torch.float32, device=x.device)
    block_r, blocks = max(16, triton.next_power_of_2(rank)), triton.cdiv(tokens, _TOKENS)
    grouped_shrink_kernel[(rows, blocks)](
        x, A, ids, inner, tokens, rank, x.shape[-1], BLOCK_M=_TOKENS, BLOCK_K=_BLOCK, BLOCK_R=block_r,
        PRECISION=precision_for(x.dtype),
    )  # fmt: skip
    grouped_expand_kernel[(rows, blocks, triton.cdiv(y.shape[-1], _BLOCK))](
        inner,
        B,
        ids,
        y,
        tokens,
        rank,
        y.shape[-1],
        BLOCK_M=_TOKENS,
        BLOCK_N=_BLOCK,
        BLOCK_R=block_r,
        PRECISION=precision_for(x.dtype),
    )
    return y
