"""One budget of bytes over many matrices, spent where it captures most energy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.experts import stored_together
from adapt_convert.convert.preflight import Plan
from adapt_convert.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Units:
    """What gets a rank of its own: `of` leads from a tensor to its unit, `numbers` from a unit to how many numbers one rank of it takes.

    A unit is one matrix, or all experts to which PEFT gives one rank. Factors that are stored for several modules count for each.
    """

    of: Mapping[str, str]
    numbers: Mapping[str, int]


def units_of(plan: Plan, base: Checkpoint) -> Units:
    """The units of the matrices that a plan factors."""
    of, numbers = dict[str, str](), dict[str, int]()
    stored = set()
    for entry in plan.having("factor"):
        together = stored_together(entry.module, plan.family)
        of[entry.name] = together[0] if together else entry.name
        if together:
            stored.add(together)
        else:
            numbers[entry.name] = sum(entry.matrix_shape) * (1 + len(plan.aliases(entry.name)))
    for name, key in plan.base_keys.items() if stored else ():  # experts that did not change are stored too, as zeros
        together = stored_together(name.removesuffix(".weight"), plan.family)
        if together in stored:
            assert together is not None
            numbers[together[0]] = numbers.get(together[0], 0) + sum(base.infos[key].shape)
    return Units(of, numbers)


def spend_budget(spectra: Mapping[str, Tensor], units: Units, itemsize: int, budget: int) -> dict[str, int]:
    """Ranks by matrix: always the next rank of a unit with the most energy per byte, while it fits.

    `spectra` are singular values, largest first; of a unit of several matrices the next ones of all are bought together. Within a matrix
    the values fall, so the greedy choice is the best spending of all but the last bytes. A matrix may get rank 0: no factors.
    """
    members: dict[str, list[Tensor]] = {}
    for name, values in spectra.items():
        members.setdefault(units.of[name], []).append(values)
    energies = {unit: _summed(held) for unit, held in members.items()}
    costs = {unit: units.numbers[unit] * itemsize for unit in members}
    ranks = dict.fromkeys(energies, 0)
    heap = [(-float(own[0]) / costs[unit], unit) for unit, own in energies.items() if len(own)]
    heapq.heapify(heap)
    while heap:
        _, unit = heapq.heappop(heap)
        if costs[unit] > budget:
            continue  # a cheaper one may still fit
        budget -= costs[unit]
        ranks[unit] += 1
        if ranks[unit] < len(energies[unit]):
            heapq.heappush(heap, (-float(energies[unit][ranks[unit]]) / costs[unit], unit))
    return {name: ranks[units.of[name]] for name in spectra}


def _summed(spectra: Iterable[Tensor]) -> Tensor:
    """The energy that each further rank of all the matrices brings, float64."""
    spectra = list(spectra)
    energies = torch.zeros(max(len(values) for values in spectra), dtype=torch.float64)
    for values in spectra:
        energies[: len(values)] += values.cpu().double().square()
    return energies
