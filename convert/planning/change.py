"""What a fine-tune changed: the spectrum of every matrix, its effective rank and its noise floor, in one pass over the pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.architectures import is_head
from adapt_convert.convert.delta import Delta, LowRankDelta
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.planning.rounding import Rounding, measure_rounding
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.svd import factorise, least_rank

_WHOLE = 1024  # a matrix up to this side has all of its singular values taken, as the exact way costs hardly more
_LEADING = 128  # of a larger one so many


@dataclass(frozen=True)
class MatrixChange:
    """The change of one matrix: `energy` is `||D||_F^2`, `values` its largest singular values, float64, in falling order.

    `whole` says that they are all above rounding. `shape` is `(out, in)` of the change, which has the base's rows.
    """

    entry: Entry
    shape: tuple[int, int]
    energy: float
    values: Tensor
    whole: bool
    rounding: Rounding

    def captured(self, rank: int) -> float:
        """The energy that the best approximation of this rank holds (Eckart and Young 1936); `rank` must be known."""
        return min(self.energy, float(self.values[:rank].square().sum()))

    def knows(self, rank: int) -> bool:
        return self.whole or rank <= len(self.values)

    def rank_for(self, share: float) -> int | None:
        """The least rank that captures a share of the energy, as `--energy` chooses it; None when that is beyond what is known."""
        found = least_rank(self.values, share * self.energy * (1 - 1e-9))
        return len(self.values) if found is None and self.whole else found

    def effective_rank(self) -> tuple[float, float]:
        """Bounds of the participation ratio of the energies, `(sum s^2)^2 / sum s^4`: k equal singular values give k.

        The bounds meet where all values are known. Otherwise the unknown ones hold an energy that is known and are each no larger
        than the smallest known one: their `sum s^4` is least when all are equal and largest when few hold it all.
        """
        if self.energy <= 0 or not len(self.values):
            return 0.0, 0.0
        fourth = float(self.values.pow(4).sum())
        rest = 0.0 if self.whole else max(0.0, self.energy - float(self.values.square().sum()))
        unknown = max(1, min(self.shape) - len(self.values))
        square = self.energy**2
        return square / (fourth + rest * float(self.values[-1]) ** 2), square / (fourth + rest**2 / unknown)

    def to_json(self, total: float) -> dict[str, Any]:
        low, high = self.effective_rank()
        return {
            "kind": kind_of(self.entry),
            "layer": layer_of(self.entry),
            "shape": list(self.shape),
            "energy": self.energy,
            "share_of_all_matrices": self.energy / total,
            "effective_rank": [round(low, 3), round(high, 3)],
            "rank_for_90_percent": self.rank_for(0.9),
            "singular_values": [float(value) for value in self.values[:16]],
            **self.rounding.to_json(self.energy),
        }


def measure_changes(pairs: Pairs, plan: Plan, seed: int, progress: Progress, rounding: bool = True) -> list[MatrixChange]:
    """Every matrix that the plan would factor, in order; each is read once, and with `rounding` its base once more."""

    def work(entry: Entry, delta: Delta) -> MatrixChange:
        small = min(delta.shape)
        wanted = small if small <= _WHOLE else _LEADING
        if not delta.energy() > 0:
            return MatrixChange(entry, delta.shape, 0.0, torch.zeros(0, dtype=torch.float64), True, Rounding())
        factorisation = factorise(delta, wanted, torch.Generator().manual_seed(seed))
        values = factorisation.values
        whole = isinstance(delta, LowRankDelta) or wanted == small or len(values) < wanted
        noise = measure_rounding(pairs, entry, delta) if rounding else Rounding()
        return MatrixChange(entry, delta.shape, factorisation.energy, values.cpu(), whole, noise)

    return [change for _, change in pairs.each(progress(plan.having("factor"), "taking spectra"), work)]


def kind_of(entry: Entry) -> str:
    """What a tensor is, in a word: its role in the attention or MLP, or embedding, head, norm, bias or other."""
    if entry.place is not None:
        return entry.place.role
    if entry.kind == "embedding":
        return "embedding"
    if is_head(entry.name):
        return "head"
    if entry.name.endswith(".bias"):
        return "bias"
    return "norm" if re.search(r"norm|ln_", entry.module.lower()) else "other"


def layer_of(entry: Entry) -> int | None:
    """The number of a tensor's layer; None outside the layers."""
    if entry.place is not None:
        return entry.place.layer
    found = re.search(r"\.(\d+)\.", f".{entry.name}")
    return int(found[1]) if found else None


def mean_effective_rank(changes: Sequence[MatrixChange]) -> list[float]:
    """The means of the lower and of the upper bound of the matrices' effective ranks, as reports give them."""
    bounds = [change.effective_rank() for change in changes]
    return [round(sum(bound[side] for bound in bounds) / len(bounds), 3) for side in (0, 1)]


def captured_by_rank(changes: Sequence[MatrixChange], rank: int) -> float | None:
    """The share of several matrices' energy that rank `rank` each captures; None when a spectrum does not reach so far."""
    total = sum(change.energy for change in changes)
    if total <= 0 or not all(change.knows(rank) for change in changes):
        return None
    return sum(change.captured(rank) for change in changes) / total
