"""Which adapter each row of a batch runs with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError


class Tasks:
    """Which task each row of a batch is of; shared by all modules of one model. 0 is the base, `count` the number of tasks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None  # (rows, count), 1 at a row's own task

    def set(self, ids: Tensor | None) -> None:
        self.ids = ids
        self.mask = None if ids is None else functional.one_hot(ids, self.count + 1)[:, 1:].float()

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask with one row for each row of x's first dim; None when all rows are of the only task."""
        if self.mask is None:
            return None if self.count == 1 else x.new_zeros(x.shape[0], self.count, dtype=torch.float32)
        if self.mask.device != x.device:
            self.mask = self.mask.to(x.device)
        return _spread(self.mask, x)

    def ids_for(self, x: Tensor) -> Tensor | None:
        """The ids in the same way; None as in `mask_for`, zeros for a bundle whose tasks are not set."""
        if self.ids is None:
            return None if self.count == 1 else torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        if self.ids.device != x.device:
            self.ids = self.ids.to(x.device)
        return _spread(self.ids, x)


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    """One entry for each row of x: some models flatten (batch, tokens) to one dim before the MLP."""
    if len(rows) == x.shape[0]:
        return rows
    if x.ndim == 2 and x.shape[0] % len(rows) == 0:
        return rows.repeat_interleave(x.shape[0] // len(rows), 0)
    raise AdaptError(f"task_ids names {len(rows)} rows, the batch has {x.shape[0]}; give one task for each row")
