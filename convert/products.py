"""Products of a large matrix with a block of columns, as fast as a processor has them.

Torch leaves matrix products in float32 to MKL, which takes half of an AVX-512 processor that is not Intel's, and those in bfloat16 to
oneDNN, which copies all of W into a layout of its own first. A 1x1 convolution over the rows of W, channels last, is the same product
by kernels of oneDNN that take W as it lies: of a 4096 x 4096 matrix with 16 to 64 columns it takes between half and nine tenths of the
time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

# Where the convolution gains: numbers of W and columns at least, by dtype; rows of W at least, and columns at most.
_LEAST = {torch.float32: (2**20, 2), torch.bfloat16: (2**22, 16)}
_LEAST_ROWS, _COLUMNS = 512, 64
_IMAGES = 16  # into which the rows are divided: torch leaves a convolution of fewer in float32 to MKL
_ROWS = 256  # of W per product: with a block of columns, a 4096-wide matrix's 4 MB stay in the processor's cache


def times(weight: Tensor, x: Tensor) -> Tensor:
    """`W x`, `(out, k)`, of `W (out, in)` and `x (in, k)`, both float32 or both bfloat16."""
    return _times(weight, x) if weight.is_contiguous() else _transposed_times(weight.T, x)


def transposed_times(weight: Tensor, x: Tensor) -> Tensor:
    """`W^T x`, `(in, k)`, of `W (out, in)` and `x (out, k)`, both float32 or both bfloat16."""
    return _transposed_times(weight, x) if weight.is_contiguous() else _times(weight.T, x)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    if _gains_by_convolution(weight, x):
        pixels = conv2d(_images(weight), x.T[:, :, None, None])
        return pixels.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    if weight.dtype == torch.bfloat16:
        return (x.T @ weight.T).T  # on a CPU, less time than the same without transposition
    if weight.device.type != "cpu" or x.shape[1] > _COLUMNS:
        return weight @ x
    out = torch.empty(weight.shape[0], x.shape[1])
    for start in range(0, weight.shape[0], _ROWS):  # four fifths of the time of the whole product
        torch.mm(weight[start : start + _ROWS], x, out=out[start : start + _ROWS])
    return out


def _transposed_times(weight: Tensor, x: Tensor) -> Tensor:
    if weight.dtype == torch.float32 and _gains_by_convolution(weight, x):
        # What a convolution's weights get for a gradient is the sum over the pixels: here, over the rows.
        size = (x.shape[1], weight.shape[1], 1, 1)
        gradient: Tensor = conv2d_weight(_images(weight), size, _images(x.contiguous()))  # type: ignore[no-untyped-call]
        return gradient.view(size[:2]).T
    return (x.T @ weight).T  # reads the rows of W in order: on a CPU a third faster than the product with a transposed W


@functools.cache
def has_instructions(*names: str) -> bool:
    """Whether the processor has some of these sets of instructions (`avx512_f`, `avx512_bf16`, `amx_bf16` ...)."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return any(capabilities.get(name) for name in names)


@functools.cache
def _convolves() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and has_instructions("avx512_f")  # type: ignore[no-untyped-call]


def _gains_by_convolution(weight: Tensor, x: Tensor) -> bool:
    (numbers, columns), rows = _LEAST[weight.dtype], weight.shape[0]
    fits = rows % _IMAGES == 0 and rows >= _LEAST_ROWS and weight.numel() >= numbers and columns <= x.shape[1] <= _COLUMNS
    return fits and weight.is_contiguous() and weight.device.type == "cpu" and _convolves()


def _images(matrix: Tensor) -> Tensor:
    """The rows of a contiguous matrix as pixels, its columns as channels, of a few images whose channels come last."""
    return matrix.view(_IMAGES, matrix.shape[0] // _IMAGES, 1, matrix.shape[1]).permute(0, 3, 1, 2)
