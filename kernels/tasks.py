"""Which adapter each row of a batch runs with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError


class Tasks:
    """The task of each row of a batch, shared by all modules of one model; 0 is the base, `count` the number of tasks.

    Until ids are set, every row of a single adapter is its own and every row of several is the base's.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.ids: Tensor | None = None
        self._mask: Tensor | None = None  # (rows, count), 1 at a row's own task

    def set(self, ids: Tensor | None) -> None:
        self.ids = ids
        self._mask = None if ids is None else functional.one_hot(ids, self.count + 1)[:, 1:].float()

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask with one row for each row of x's first dim; None when all rows are of the only task."""
        if self._mask is not None:
            return _spread(self._mask, x)
        return None if self.count == 1 else x.new_zeros(x.shape[0], self.count, dtype=torch.float32)

    def ids_for(self, x: Tensor) -> Tensor | None:
        """The ids in the same way; None as in `mask_for`, zeros for several adapters whose tasks are not set."""
        if self.ids is not None:
            return _spread(self.ids, x)
        return None if self.count == 1 else torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def rows_of(self, x: Tensor) -> Tensor:
        """The ids for all rows, also those of a single adapter: every row is of the first task."""
        ids = self.ids_for(x)
        return torch.ones(x.shape[0], dtype=torch.long, device=x.device) if ids is None else ids


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    """One entry for each row of x: some models flatten (batch, tokens) to one dim before the MLP."""
    rows = rows.to(x.device)
    if len(rows) == x.shape[0]:
        return rows
    if x.ndim == 2 and x.shape[0] % len(rows) == 0:
        return rows.repeat_interleave(x.shape[0] // len(rows), 0)
    raise AdaptError(f"task_ids names {len(rows)} rows, the batch has {x.shape[0]}; give one task for each row")
