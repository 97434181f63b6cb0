"""The LoRA that errs least on real inputs: `min E||(D - B A) x||^2` over all of rank r, in closed form.

With `C = E[x x^T] = L L^T` that is `min ||(D - B A) L||_F`, solved by the leading left singular vectors U of `D L`: `B A = U U^T D`
(as in SVD-LLM, arXiv 2403.07378, for whole weights). No inverse of L is taken, so that a delta of low rank stays exact.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from adapt_convert.convert.calibration.moments import FindMoments, Moments
from adapt_convert.convert.calibration.work import Work
from adapt_convert.convert.delta import Delta, LowRankDelta, residual_energy
from adapt_convert.convert.experts import seat_of
from adapt_convert.convert.lora import solve_lora
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.report import Record
from adapt_convert.convert.svd import orthonormal
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.peft import LoraAdapter

UNREACHED = "no token of the calibration text was sent to this expert: solved as without text"


class WhitenedPairs(Pairs):
    """The same two sides, their deltas as `D L`: what a solver captures of those is captured of the outputs.

    So is what it spends a budget on. A row of an embedding is read as often as its token comes, one of the biases of experts as often as
    its expert is chosen: on average once in as many as there are, which is the weight that each row gets.
    """

    def __init__(self, pairs: Pairs, moments: Moments) -> None:
        super().__init__(pairs.base, pairs.source, pairs.device)
        self._moments = moments

    def passing_delta(self, entry: Entry) -> Delta:
        delta = super().passing_delta(entry)
        if self._moments.knows(entry.module):
            return times(delta, self._moments.root(entry.module).to(self.device))
        return times(delta, 1 / math.sqrt(delta.shape[0]))


def modules_with_inputs(plan: Plan) -> list[str]:
    """The matrices of a plan that multiply an input: all but tables of which rows are read."""
    seats = {entry: seat_of(entry.module, plan.family) for entry in plan.having("factor") if entry.kind == "matrix"}
    return [entry.module for entry, seat in seats.items() if seat is None or seat.number is not None]


def times(delta: Delta, right: Tensor | float) -> Delta:
    """`D @ right`, or D times a number."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.B, delta.A @ right if isinstance(right, Tensor) else delta.A * right)
    return replace(delta, weight=delta.weight @ right if isinstance(right, Tensor) else delta.weight * right)


def solve_whitened_lora(
    work: Work, find_moments: FindMoments, options: Options, first: tuple[LoraAdapter, list[Record]]
) -> tuple[LoraAdapter, list[Record]]:
    """`solve_lora` with every error weighed by the inputs; the records say what is held of the deltas themselves."""
    pairs, plan, progress = work.pairs, work.plan, work.progress
    moments = find_moments(modules_with_inputs(plan), {})
    dtype = torch_dtype(output_dtype(options, pairs.source))
    budget = int(options.budget) * torch.float32.itemsize // dtype.itemsize if options.budget else None  # as many numbers
    adapter, records = solve_lora(
        WhitenedPairs(pairs, moments), plan, options.changed(dtype="float32", budget=budget), work.stored, progress
    )
    entries = [record.entry for record in records if record.status == "factored"]
    found: dict[Entry, Record] = {}
    by_alias = {e: [a.removesuffix(".weight") for a in plan.aliases(e.name)] for e in entries if e.kind == "embedding"}

    def project(entry: Entry, delta: Delta) -> tuple[LowRankDelta, float, float]:
        held = adapter.embeddings if entry.kind == "embedding" else adapter.factors
        factors = _projected(delta, held[entry.module].B.to(pairs.device))
        written = factors.cast(dtype)
        residual = residual_energy(delta, written.cast(torch.float32))
        return LowRankDelta(written.B.cpu().contiguous(), written.A.cpu().contiguous()), delta.energy(), residual

    for entry, (factors, energy, residual) in pairs.each(progress(entries, "factoring on inputs"), project):
        for module in (entry.module, *by_alias.get(entry, [])):
            (adapter.embeddings if module in adapter.embeddings else adapter.factors)[module] = factors
        reached = not moments.knows(entry.module) or moments.is_reached(entry.module)
        found[entry] = Record(entry, "factored", energy, residual, "" if reached else UNREACHED, factors.rank)
    return adapter, [found.get(record.entry) or _in_own_units(record, pairs) for record in records]


def _projected(delta: Delta, B: Tensor) -> LowRankDelta:
    """`U U^T D` for the range U of `B (out, r)`, as factors of one scale."""
    U = orthonormal(B.double()).float()
    left, values, right = torch.linalg.svd(delta.rmatmul(U).T.double(), full_matrices=False)
    root = values.sqrt()
    return LowRankDelta((U.double() @ (left * root)).float(), (right * root[:, None]).float())


def _in_own_units(record: Record, pairs: Pairs) -> Record:
    """A matrix that the budget left without factors: its energy as a delta, not as outputs."""
    if record.status != "dropped" or record.entry.action != "factor":
        return record
    energy = pairs.delta(record.entry).energy()
    return replace(record, energy=energy, residual=energy)
