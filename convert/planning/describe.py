"""The forecast's account of the change itself: by kind of tensor, by layer and by matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from adapt_convert.convert.planning.change import MatrixChange, captured_by_rank, kind_of, layer_of, mean_effective_rank
from adapt_convert.convert.planning.rounding import Rounding
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.report import Record
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.source import Source

_CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # ranks of the spectra by kind


def describe_changes(plan: Plan, changes: Sequence[MatrixChange], stored: dict[Entry, float], records: Iterable[Record]) -> dict[str, Any]:
    """`energy` of everything that changed, and how it lies; shares are of it unless their name says otherwise."""
    energies = {change.entry: change.energy for change in changes} | stored
    energies |= {record.entry: record.energy for record in records}
    energies = {entry: energy for entry, energy in energies.items() if energy > 0}
    total = sum(energies.values())
    matrices = sum(change.energy for change in changes)
    in_layers = {entry: energy for entry, energy in energies.items() if layer_of(entry) is not None}
    by_kind: dict[str, list[MatrixChange]] = defaultdict(list)
    for change in changes:
        if change.energy > 0:
            by_kind[kind_of(change.entry)].append(change)
    return {
        "energy": total,
        "energy_of_matrices": matrices,
        "changed_tensors": len(energies),
        "unchanged_tensors": len(plan.entries) - len(energies),
        "rounding": sum((change.rounding for change in changes), Rounding()).to_json(matrices),
        "kinds": {kind: _kind(by_kind.get(kind, []), share) for kind, share in _shares(energies, total, kind_of).items()},
        "layers": {str(layer): share for layer, share in _shares(in_layers, total, layer_of).items()},
        "places": _places(energies, total),
        "spectra": {kind: _curve(held) for kind, held in by_kind.items()},
        "matrices": {change.entry.name: change.to_json(matrices) for change in changes if change.energy > 0},
    }


def full_bytes(source: Source, changes: Sequence[MatrixChange], stored: dict[Entry, float]) -> int:
    """The bytes of all changed tensors as the fine-tune stores them, or of the adapter that is to be converted."""
    if source.kind != "checkpoint":
        return source.store.nbytes
    entries = [change.entry for change in changes if change.energy > 0] + list(stored)
    return sum(math.prod(entry.part.shape) * torch_dtype(entry.part.dtype).itemsize for entry in entries)


def _shares(energies: dict[Entry, float], total: float, key: Any) -> dict[Any, float]:
    """The share of the energy by what `key` says of a tensor, largest first but for numbers, which come in order."""
    sums: dict[Any, float] = defaultdict(float)
    for entry, energy in energies.items():
        sums[key(entry)] += energy / total
    order = sorted(sums, key=lambda name: name if isinstance(name, int) else -sums[name])
    return {name: sums[name] for name in order}


def _kind(changes: Sequence[MatrixChange], share: float) -> dict[str, Any]:
    """One kind of tensor; of matrices also the mean effective rank and what is rounding."""
    row: dict[str, Any] = {"share": share, "matrices": len(changes)}
    if not changes:
        return row
    energy = sum(change.energy for change in changes)
    rounding = sum((change.rounding for change in changes), Rounding()).to_json(energy)
    return row | {"effective_rank": mean_effective_rank(changes), "captured_by_rank_16": captured_by_rank(changes, 16), **rounding}


def _places(energies: dict[Entry, float], total: float) -> list[dict[str, Any]]:
    """The share of each matrix of the layers, by role and layer."""
    sums: dict[tuple[str, int], float] = defaultdict(float)
    for entry, energy in energies.items():
        if entry.place is not None:
            sums[entry.place.role, entry.place.layer] += energy / total
    return [{"kind": role, "layer": layer, "share": share} for (role, layer), share in sorted(sums.items())]


def _curve(changes: Sequence[MatrixChange]) -> list[list[float]]:
    """`[rank, captured share]` of all matrices of a kind together, as far as their spectra are known."""
    points = ((rank, captured_by_rank(changes, rank)) for rank in _CURVE if rank <= max(min(c.shape) for c in changes))
    return [[rank, share] for rank, share in points if share is not None]
