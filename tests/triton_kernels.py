"""Triton kernels against their PyTorch references: collected by `test_kernels.py`, in processes of their own.

With `TRITON_INTERPRET=1`, set before Triton is imported, they run under Triton's interpreter on the CPU, without it on a GPU. Whatever a
kernel allocates is poisoned with NaN first, so that an element it does not write, or one that it reads beyond the data, cannot pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_convert.kernels.expanded_norm import NormShape, expanded_norm_reference
from adapt_convert.kernels.expanded_norm_triton import expanded_norm_kernel, expanded_norm_triton
from adapt_convert.kernels.grouped import grouped_lora_add_reference
from adapt_convert.kernels.grouped_triton import grouped_expand_kernel, grouped_lora_add_triton, grouped_shrink_kernel
from adapt_convert.kernels.lorta import lorta_apply
from adapt_convert.kernels.lorta_triton import heads_expand_kernel, heads_shrink_kernel, lorta_add_triton

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `torch.empty` is full of NaN, and on the device of the kernels, as is all else."""
    real = torch.empty

    def empty(*size: Any, **kwargs: Any) -> torch.Tensor:
        made = real(*size, **{"device": DEVICE, **kwargs})
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def padded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers that end where NaN begins: a read beyond the last element shows."""
    count = math.prod(shape)
    whole = torch.full((count + 4096,), math.nan, dtype=dtype)
    whole[:count] = torch.randn(count).to(dtype)
    return whole[:count].view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "gemma", "layer"])
@pytest.mark.parametrize(
    ("lead", "d", "rank", "tasks", "masked"),
    [
        ((1, 1), 32, 4, 1, False),
        ((2, 3), 37, 5, 1, False),
        ((2, 3), 37, 5, 1, True),
        ((3, 2), 1027, 3, 4, True),
        ((5,), 64, 1, 2, True),
        ((2, 2, 3), 8, 0, 1, False),
    ],
)
def test_expanded_norm(lead: tuple[int, ...], d: int, rank: int, tasks: int, masked: bool, kind: Any, dtype: torch.dtype) -> None:
    shape = NormShape(d, rank, tasks, kind, 1e-6)
    x, gain = padded(*lead, shape.width, dtype=dtype), padded(shape.width, dtype=dtype)
    gain[d:] = 1.0
    bias = None
    if kind == "layer":
        bias = padded(shape.width, dtype=dtype)
        bias[d:] = 0.0
    mask = None
    if masked:
        mask = torch.nn.functional.one_hot(torch.arange(lead[0]) % (tasks + 1), tasks + 1)[:, 1:].float().contiguous()
    expected = expanded_norm_reference(x, gain, bias, mask, shape)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(expanded_norm_triton(x, gain, bias, mask, shape), expected, **DTYPES[dtype])


def test_expanded_norm_addresses_beyond_32_bits(tmp_path: Path) -> None:
    """Rows 2^30 elements apart, in a file with holes: the third starts at 2^31, where 32-bit offsets turn negative."""
    stride, shape = 2**30, NormShape(8, 2, 1, "rms", 1e-6)
    far = holes(tmp_path / "holes", 2 * stride + 64, torch.bfloat16)
    rows = torch.randn(3, shape.width).bfloat16()
    for number, row in enumerate(rows):
        far[number * stride : number * stride + shape.width] = row
    gain, out = torch.ones(shape.width).bfloat16(), torch.empty(3, shape.width, dtype=torch.bfloat16)
    expanded_norm_kernel[(3,)](
        far, gain, far, far, out, 3, 8, 2, stride, shape.width, 1e-6,
        TASKS=1, KIND=0, HAS_BIAS=False, MASKED=False, BLOCK=8, BLOCK_R=2,
    )  # fmt: skip
    torch.testing.assert_close(out, expanded_norm_reference(rows, gain, None, None, shape), **DTYPES[torch.bfloat16])


def holes(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros as large as an address space needs, in a file that takes no room. On a GPU it is allocated whole."""
    if not ON_GPU:
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    if torch.cuda.mem_get_info()[0] < 1.1 * size * dtype.itemsize:
        pytest.skip("needs a larger GPU")
    return torch.zeros(size, dtype=dtype)


def test_lorta_addresses_beyond_32_bits(tmp_path: Path) -> None:
    """The third row of y, and of x, starts at 2^31."""
    stride, head_size, rank = 2**30, 16, 3
    B, heads, inner = torch.randn(head_size, rank), torch.randn(1, rank), torch.randn(3, rank)
    blocks = {"BLOCK_M": 16, "BLOCK_R": 16, "PRECISION": "ieee"}
    y = holes(tmp_path / "y", 2 * stride + 64, torch.float32)
    heads_expand_kernel[(1, 1, 1)](inner, B, heads, y, 3, rank, head_size, stride, BLOCK_N=16, **blocks)
    torch.testing.assert_close(y[2 * stride :][:head_size], (inner[2] * heads[0]) @ B.T)
    x, out = holes(tmp_path / "x", 2 * stride + 64, torch.float32), torch.empty(3, rank)
    x[2 * stride :][:head_size] = torch.arange(head_size).float()
    heads_shrink_kernel[(1,)](x, B, heads, out, 3, rank, 1, head_size, stride, BLOCK_K=16, **blocks)
    torch.testing.assert_close(out[2], (torch.arange(head_size).float() @ B) * heads[0])


def test_grouped_lora_addresses_beyond_32_bits(tmp_path: Path) -> None:
    """Rows of 2^28 tokens of 8 channels: the third starts at 2^32; its first tokens are looked at."""
    tokens, width, rank = 2**28, 8, 8
    A, B, ids = torch.randn(1, rank, width), torch.randn(1, width, rank), torch.tensor([0, 0, 1])
    x, y = (holes(tmp_path / name, 3 * tokens * width, torch.float32) for name in "xy")
    inner = holes(tmp_path / "inner", 3 * tokens * rank, torch.float32)
    start = 2 * tokens * width
    x[start:][:width] = torch.arange(width).float()
    blocks = {"BLOCK_M": 16, "BLOCK_R": 16, "PRECISION": "ieee"}
    grouped_shrink_kernel[(3, 1)](x, A, ids, inner, tokens, rank, width, BLOCK_K=16, **blocks)
    grouped_expand_kernel[(3, 1, 1)](inner, B, ids, y, tokens, rank, width, BLOCK_N=16, **blocks)
    torch.testing.assert_close(y[start:][:width], B[0] @ (A[0] @ torch.arange(width).float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(("lead", "d", "heads", "size", "rank"), [((1, 1), 32, 4, 8, 4), ((3, 7), 37, 3, 13, 5), ((19,), 24, 2, 80, 17)])
def test_lorta_add(lead: tuple[int, ...], d: int, heads: int, size: int, rank: int, reads: bool, dtype: torch.dtype) -> None:
    A, B, C = (padded(n, rank, dtype=dtype) / math.sqrt(rank) for n in (d, size, heads))
    x, y = padded(*lead, d if reads else heads * size, dtype=dtype), padded(*lead, heads * size if reads else d, dtype=dtype)
    expected = y.float() + lorta_apply(x.float(), A.float(), B.float(), C.float(), reads)
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(lorta_add_triton(y.clone(), x, A, B, C, reads).float(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "tokens", "d", "out", "rank", "tasks"), [(1, 1, 16, 16, 1, 1), (5, 3, 37, 71, 5, 3), (4, 18, 130, 33, 17, 2)]
)
def test_grouped_lora_add(rows: int, tokens: int, d: int, out: int, rank: int, tasks: int, dtype: torch.dtype) -> None:
    A, B = padded(tasks, rank, d, dtype=dtype) / math.sqrt(d), padded(tasks, out, rank, dtype=dtype)
    x, y = padded(rows, tokens, d, dtype=dtype), padded(rows, tokens, out, dtype=dtype)
    ids = torch.arange(rows) % (tasks + 1)
    expected = grouped_lora_add_reference(y.float(), x.float(), A.float(), B.float(), ids)
    written = grouped_lora_add_triton(y.clone(), x, A, B, ids)
    assert torch.equal(written[ids == 0], y[ids == 0])
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(written.float(), expected, **tolerance)
