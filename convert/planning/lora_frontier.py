"""LoRAs that could be written: by the theorem of Eckart and Young their captured energies follow from the spectra alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from adapt_convert.convert.lora import assemble
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.pieces import Piece
from adapt_convert.convert.planning.candidates import Candidate, candidate
from adapt_convert.convert.planning.change import MatrixChange
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.ranks import Units, spend_budget, units_of
from adapt_convert.convert.report import Record
from adapt_convert.formats.dtypes import torch_dtype

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
ENERGIES = (0.5, 0.75, 0.9, 0.99)


def lora_frontier(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], rest: Sequence[Record], changes: Sequence[MatrixChange]
) -> Iterator[Candidate]:
    """One rank for all matrices, the same bytes spent by `--budget`, and `--energy`: as far as the spectra are known."""
    dtype = torch_dtype(output_dtype(options, pairs.source))
    changed = [change for change in changes if change.energy > 0]
    units = units_of(plan, pairs.base)

    def make(how: str, ranks: Mapping[str, int]) -> Candidate:
        solved = [(change.entry, _empty_piece(change, ranks.get(change.entry.name, 0), dtype)) for change in changes]
        return candidate(how, options, *assemble(pairs, plan, stored, solved), rest)

    largest = max((min(change.shape) for change in changed), default=0)
    used: dict[str, int] = {}
    for rank in (rank for rank in RANKS if rank <= largest):
        ranks = _ranks(changed, [rank if change.knows(rank) else None for change in changed])
        if ranks is None or ranks == used:  # beyond what is known, or no matrix has more to give
            break
        used = ranks
        yield make(f"--rank {rank}", ranks)
        budget = dtype.itemsize * sum(rank_of_unit * units.numbers[unit] for unit, rank_of_unit in _by_unit(ranks, units).items())
        if (spent := _spent(changed, units, dtype.itemsize, budget)) and spent != ranks:
            yield make(f"--budget {budget}B", spent)
    for share in ENERGIES:
        if ranks := _ranks(changed, [change.rank_for(share) for change in changed]):
            yield make(f"--energy {share:g}", ranks)


def _ranks(changed: Sequence[MatrixChange], wanted: Sequence[int | None]) -> dict[str, int] | None:
    """A rank for every matrix, never more than it has; None when one wants more than is known of its spectrum."""
    if None in wanted:
        return None
    return {change.entry.name: min(rank or 0, len(change.values)) for change, rank in zip(changed, wanted, strict=True)}


def _by_unit(ranks: Mapping[str, int], units: Units) -> dict[str, int]:
    """The rank of each unit: the largest of its matrices, to which the others are padded."""
    largest: dict[str, int] = {}
    for name, rank in ranks.items():
        largest[units.of[name]] = max(rank, largest.get(units.of[name], 0))
    return largest


def _spent(changed: Sequence[MatrixChange], units: Units, itemsize: int, budget: int) -> dict[str, int] | None:
    ranks = spend_budget({change.entry.name: change.values for change in changed}, units, itemsize, budget)
    if not all(change.whole or ranks[change.entry.name] < len(change.values) for change in changed):
        return None  # the next value, which is not known, might be worth buying
    return ranks


def _empty_piece(change: MatrixChange, rank: int, dtype: torch.dtype) -> Piece:
    """What the solver would return, but for the numbers in the factors."""
    if not rank:
        return Piece({}, {"energy": change.energy})
    rows, columns = change.shape
    shapes = {"B": (rows, rank), "A": (rank, columns)}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return Piece(tensors, {"energy": change.energy, "residual": change.energy - change.captured(rank)})
