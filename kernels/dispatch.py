"""Where an op runs: by its Triton kernel on a GPU, else by its PyTorch reference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_RANK = 128  # above, the blocks of a kernel that holds the whole rank outgrow the shared memory of some GPUs


def precision_for(dtype: torch.dtype) -> str:
    """How a kernel multiplies float32 values made of `dtype`: TF32 holds all of a half-precision number and runs on tensor cores."""
    return "tf32" if dtype in (torch.bfloat16, torch.float16) else "ieee"


def runs_on_triton(x: Tensor, rank: int = 1) -> bool:
    return x.is_cuda and rank <= MAX_RANK and _triton_available()


@cache
def _triton_available() -> bool:
    """Whether there is a Triton to import; asked of the import system without importing it."""
    return find_spec("triton") is not None
