"""Searches for the rank-1 terms that explain most of a core, many of them side by side.

Source: De Lathauwer, De Moor and Vandewalle 2000 (the higher-order power method: least squares of one column, whose other factors have
norm 1, is their product with the core).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapt_convert.convert.lorta.cp_core import (
    INNER,
    TINY,
    Array,
    Core,
    Model,
    contract_b,
    contract_heads,
    lengths_of,
    product_a,
    product_b,
    product_c_h,
    product_c_l,
    product_c_m,
    project,
    random_model,
    squares_of,
    sum_of,
)

_LEFT, _SWEEPS = 6, 2  # searches that go on after the last halving of a first round; sweeps before each halving
_ALIKE = 0.1  # cosine above which two terms count as one


@dataclass(frozen=True)
class Effort:
    """`halvings`: how often the better half of a round's searches is kept, of half as many to begin with where it has a pool; a round adds
    the terms that explain at least `share` of its best."""

    halvings: int
    share: float


class Search:
    """Models of one column each: the columns of one `model`, of the core's dtype.

    Factors have norm 1, those of C_m of all groups together. With its best scale a column explains `explained (r,)` of the core's energy,
    the square of that scale.
    """

    def __init__(self, core: Core, model: Model) -> None:
        self.core, self.groups = core, range(core.groups)
        kind = np.float64 if core.dtype == torch.float64 else np.float32
        self.model = [factor.astype(kind, copy=False) for factor in model]
        self.explained = np.zeros(len(model[0]))

    def _set(self, n: int, factor: Array) -> Array:
        lengths = lengths_of(factor)
        self.model[n] = factor / (lengths + TINY)
        return lengths

    def others(self, projected: list[Array]) -> None:
        """A sweep over all factors but A."""
        core, model = self.core, self.model
        self._set(1, product_b(core, model, projected))
        small = contract_b(core, model, projected)
        for group in self.groups:
            self._set(3 + group, product_c_h(core, model, small, group))
        rest = contract_heads(model, small)
        c_m = [product_c_m(model, rest, group) for group in self.groups]
        length = np.sqrt(sum_of([lengths_of(factor) ** 2 for factor in c_m])) + TINY
        model[3 + core.groups :] = [factor / length for factor in c_m]
        self.explained = self._set(2, product_c_l(core, model, rest))[:, 0] ** 2

    def sweep(self) -> None:
        """A, then `INNER` sweeps over the other factors on the projected core."""
        self._set(0, product_a(self.core, self.model))
        projected = project(self.core, self.model[0])
        for _ in range(INNER):
            self.others(projected)

    def best(self, most: int) -> list[int]:
        """Which columns explain most of the core, best first, no two of them alike."""
        squares = squares_of(self.model)
        cosines = sum_of([np.prod([squares[n] for n in self.core.positions(group)], axis=0) for group in self.groups])
        other = np.abs(cosines) <= _ALIKE
        chosen: list[int] = []
        free = np.ones(len(other), dtype=bool)
        for index in np.argsort(-self.explained, kind="stable").tolist():
            if len(chosen) < most and free[index]:
                chosen.append(index)
                free &= other[index]
        return chosen

    def scaled(self) -> Model:
        """The columns with their best scale, which is in C_l; float64, as a fit goes on from them whose columns may be all but equal."""
        scaled = [*self.model[:2], self.model[2] * np.sqrt(self.explained)[:, None], *self.model[3:]]
        return [factor.astype(np.float64) for factor in scaled]

    def keep(self, chosen: list[int]) -> None:
        self.model = [factor[chosen] for factor in self.model]
        self.explained = self.explained[chosen]


def best_terms(core: Core, pool: Model, most: int, effort: Effort, generator: np.random.Generator) -> tuple[Model, Model]:
    """The best rank-1 terms of a core, as one model of at most `most` columns, and the other distinct ones found.

    Searches start side by side from the pool that the last search left and from random terms; every few sweeps the better half of the
    distinct ones goes on.
    """
    searches = max(_LEFT * 2 ** (effort.halvings - bool(len(pool[0]))), 4 * most)
    pool = [factor[: searches // 2] for factor in pool]
    fresh = random_model(core, searches - len(pool[0]), generator)
    search = Search(core, [np.concatenate(parts) for parts in zip(pool, fresh, strict=True)])
    for _ in range(effort.halvings):
        searches = max(searches // 2, 2 * most)
        for _ in range(_SWEEPS):
            search.sweep()
        search.keep(search.best(searches))
    good = np.flatnonzero(search.explained >= effort.share * search.explained[0])[:most]
    rest = np.setdiff1d(np.arange(len(search.explained)), good)
    return [factor[good] for factor in search.scaled()], [factor[rest] for factor in search.model]
