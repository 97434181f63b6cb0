"""The noise floor of a change: how much of it can be the rounding of the dtype that the weights are stored in.

A light fine-tune moves most weights by less than the distance between two neighbouring bfloat16 numbers. What is stored then is
nothing or a whole step, and the difference from the true value, up to half a step either way, is no low-rank signal. A change whose
energy is below that of such errors is finer than the dtype resolves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry
from adapt_convert.formats.dtypes import FLOATS, torch_dtype

_BLOCK = 2**19  # entries at a time, which stay in the processor's cache


@dataclass(frozen=True)
class Rounding:
    """Of one matrix or of several: `entries` in all, those `unchanged`, and those changed by at most `one_step` of the dtype, which
    hold `one_step_energy` of the change.

    `fine_tune` and `base` are the noise floors of either side, to be held against the energy of the change: a twelfth of the squared
    step for each entry, which is the variance of an error that is uniform over one step (Bennett 1948). The base's counts only where
    the fine-tune did not start from the stored base but from what that was rounded from.
    """

    entries: int = 0
    unchanged: int = 0
    one_step: int = 0
    one_step_energy: float = 0.0
    fine_tune: float = 0.0
    base: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.entries + other.entries,
            self.unchanged + other.unchanged,
            self.one_step + other.one_step,
            self.one_step_energy + other.one_step_energy,
            self.fine_tune + other.fine_tune,
            self.base + other.base,
        )

    def to_json(self, energy: float) -> dict[str, Any]:
        """Shares: of the entries, and of the `energy` of their change."""
        if not self.entries or energy <= 0:
            return {}
        return {
            "unchanged_entries": self.unchanged / self.entries,
            "one_step_entries": self.one_step / self.entries,
            "one_step_energy": self.one_step_energy / energy,
            "noise_floor": self.fine_tune / energy,
            "noise_floor_of_the_base": self.base / energy,
        }


def measure_rounding(pairs: Pairs, entry: Entry, delta: Delta) -> Rounding:
    """Compare a matrix's change with the steps of the dtypes that both sides are stored in; reads the base once more.

    Empty for an adapter, which is no sum of stored weights.
    """
    if entry.part.kind != "replace" or entry.base_key is None or not isinstance(delta, DenseDelta):
        return Rounding()
    dtypes = entry.part.dtype, pairs.base.infos[entry.base_key].dtype
    if not set(dtypes) <= set(FLOATS):
        return Rounding()
    new_dtype, old_dtype = (torch_dtype(name) for name in dtypes)
    change = (delta.weight.T if entry.transposed else delta.weight).reshape(-1)
    total, position = Rounding(), 0
    for stored in pairs.base.blocks(entry.base_key, _BLOCK):
        old = stored.to(change.device, torch.float32)
        total += _of_block(old, change[position : position + len(old)], new_dtype, old_dtype)
        position += len(old)
    return total


def _of_block(old: Tensor, change: Tensor, new_dtype: torch.dtype, old_dtype: torch.dtype) -> Rounding:
    new = old + change
    new_step, old_step = step(new, new_dtype), step(old, old_dtype)
    size = change.abs()
    # A change of binade is one step of the larger side.
    single = (size > 0) & (size <= torch.maximum(new_step, old_step))
    return Rounding(
        entries=change.numel(),
        unchanged=int((size == 0).sum()),
        one_step=int(single.sum()),
        one_step_energy=_energy(size[single]),
        fine_tune=_energy(new_step) / 12,
        base=_energy(old_step) / 12,
    )


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at the size of each float32 value, away from zero."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1  # 2^exponent <= |value| < 2^(exponent + 1)
    smallest = info.eps * info.tiny
    steps = torch.ldexp(torch.full_like(values, info.eps), exponent)
    return torch.where(values == 0, smallest, steps.clamp_min(smallest))


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values).double() ** 2)
