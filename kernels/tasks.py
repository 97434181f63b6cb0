"""Which adapter each row of a batch runs with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapt_convert.formats.errors import AdaptError


@dataclass(frozen=True)
class RowFactors:
    """How rows of a LatTE's stream `[h; w; s_1 .. s_T]` enter its norms, by channel: `(rows, width)`, or `(1, width)` for all rows.

    The true residual of a row of task k has the square norm `||h||^2 - ||w||^2 + ||s_k||^2`: `signs` are these weights of the squares.
    `keeps` is 1 for what readers of the row may see, else 0; None where they may see everything. A row of no task keeps h alone.
    """

    signs: Tensor
    keeps: Tensor | None


class Tasks:
    """The task of each row of a batch, shared by all modules of one model; 0 is the base, `count` the number of tasks.

    Until ids are set, every row of a single adapter is its own and every row of several is the base's.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.ids: Tensor | None = None
        self._factors: dict[tuple[int, int], RowFactors] = {}

    def expand(self, Q: Tensor, device: torch.device) -> None:
        """Prepare for a stream with the basis `Q (d, R)`."""
        d, rank = Q.shape
        self._factors[d, rank] = self._make(d, rank, device)

    def set(self, ids: Tensor | None) -> None:
        self.ids = ids
        self._factors = {key: self._make(*key, old.signs.device) for key, old in self._factors.items()}

    def factors(self, x: Tensor, d: int, rank: int) -> RowFactors:
        """The factors of the rows of `x (rows, ..)`, on its device."""
        found = self._factors[d, rank]
        if self.ids is None:  # the same for all rows
            return RowFactors(found.signs.to(x.device), None if found.keeps is None else found.keeps.to(x.device))
        assert found.keeps is not None
        return RowFactors(_spread(found.signs, x), _spread(found.keeps, x))

    def ids_for(self, x: Tensor) -> Tensor | None:
        """One id for each row of x's first dim; None when all rows are of the only task."""
        if self.ids is None:
            return None if self.count == 1 else torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return _spread(self.ids, x)

    def _make(self, d: int, rank: int, device: torch.device) -> RowFactors:
        if self.ids is None:
            mask = torch.full((1, self.count), float(self.count == 1), device=device)
        else:
            mask = functional.one_hot(self.ids.to(device), self.count + 1)[:, 1:].float()
        own = mask.sum(1, keepdim=True)
        signs, keeps = (torch.cat([first, mask], dim=1).repeat_interleave(rank, dim=1) for first in (-own, own))
        whole = self.ids is None and self.count == 1
        return RowFactors(functional.pad(signs, (d, 0), value=1.0), None if whole else functional.pad(keeps, (d, 0), value=1.0))


def _spread(rows: Tensor, x: Tensor) -> Tensor:
    """One entry for each row of x: some models flatten (batch, tokens) to one dim before the MLP."""
    rows = rows.to(x.device)
    if len(rows) == x.shape[0]:
        return rows
    if x.ndim == 2 and x.shape[0] % len(rows) == 0:
        return rows.repeat_interleave(x.shape[0] // len(rows), 0)
    raise AdaptError(f"task_ids names {len(rows)} rows, the batch has {x.shape[0]}; give one task for each row")
