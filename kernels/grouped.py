"""Many LoRAs in one batch: every row its own low-rank product, next to the one product with the base's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_convert.kernels.dispatch import runs_on_triton


def grouped_lora_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    """`y[i] + B[ids[i] - 1] A[ids[i] - 1] x[i]` for every row i of a batch; rows with id 0 have no adapter.

    `x (rows, .., in)`, `y (rows, .., out)`, `A (T, r, in)`, `B (T, out, r)` with all scaling folded in, `ids (rows,)` from 0 to T.
    Returns `y`, which may have been overwritten.
    """
    if runs_on_triton(x, A.shape[1]):
        from adapt_convert.kernels.grouped_triton import grouped_lora_add_triton

        with torch.cuda.device(x.device):
            return grouped_lora_add_triton(y, x, A, B, ids)
    return grouped_lora_add_reference(y, x, A, B, ids)


def grouped_lora_add_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    """`grouped_lora_add` in plain PyTorch: one gather and two batched products."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    own = (ids - 1).clamp_min(0)
    added = torch.bmm(torch.bmm(rows, A[own].mT), B[own].mT)
    added = torch.where((ids > 0)[:, None, None], added, added.new_zeros(()))
    return y + added.view(y.shape)
