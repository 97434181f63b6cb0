"""A conversion that may look at text: solve with and without it, refine, and keep what is nearest to the fine-tune on rows held out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from adapt_convert.convert.calibration.judge import Figures, Judge, opened_judge
from adapt_convert.convert.calibration.moments import FindMoments, moments_of
from adapt_convert.convert.calibration.remeasure import remeasured
from adapt_convert.convert.calibration.whitened_latte import solve_whitened_latte
from adapt_convert.convert.calibration.whitened_lora import solve_whitened_lora
from adapt_convert.convert.calibration.whitened_lorta import solve_whitened_lorta
from adapt_convert.convert.calibration.work import Solved, Work
from adapt_convert.convert.loda.solver import measured_again, solve_loda
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.rank_for_budget import largest_rank
from adapt_convert.convert.refinement.refine import refine
from adapt_convert.convert.report import Record
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda import LodaAdapter
from adapt_convert.formats.loda_config import VARIANTS

# Whitened solvers, by target: what they are given last is the data-free solution.
_Whitened = Callable[[Work, FindMoments, Options, Any], Solved]
WHITENED: dict[str, _Whitened] = {"lora": solve_whitened_lora, "lorta": solve_whitened_lorta, "latte": solve_whitened_latte}


# What a text brings has to show on the control rows as well, by a third of the share, unless the text is of the kind that the fine-tune is
# for: two thirds or more of what refinement brought on such texts did, on random tokens a sixth or less (docs/benchmarks.md).
_SHARED = 1 / 3
_NOTHING = 1e-12  # nats: a divergence below is none


@dataclass(frozen=True)
class Candidate:
    """A finished adapter with its records and its figures."""

    name: str
    adapter: Any
    records: list[Record]
    figures: Figures

    @property
    def kl(self) -> float:
        return self.figures.kl


def calibrated(work: Work, options: Options) -> tuple[Any, list[Record], dict[str, Any]]:
    """The adapter, its records, and what the report says of the calibration.

    Of the data-free and the whitened solution, and of what refining the better of them gives, the one nearest to the fine-tune on
    held-out rows, as read back from files. With `target_kl` the least rank at which that is near enough. Raises `AdaptError`.
    """
    # Pieces of an interrupted conversion are of one rank and without text: they are of no use here.
    work = replace(work, pairs=Pairs(work.pairs.base, work.pairs.source, work.pairs.device))
    with opened_judge(work.pairs, options, work.progress) as judge:
        about: dict[str, Any] = {
            "text": judge.text.name,
            "tokens": judge.text.tokens,
            "heldout_tokens": judge.text.heldout_tokens,
            "seed": options.seed,
            "kl_of_base": judge.base.kl,
            "in_domain": judge.in_domain,
        }
        if options.target_kl is None:
            best, tried = _best(work, judge, options)
        else:
            best, tried, searched = _smallest(work, judge, options, options.target_kl)
            about["searched"] = searched
        return best.adapter, best.records, about | {"chosen": best.name, "kl": best.kl} | tried


def _best(work: Work, judge: Judge, options: Options) -> tuple[Candidate, dict[str, Any]]:
    """The best candidate of one size, and the figures of all."""
    candidates = [
        Candidate(name, adapter, records, judge.figures(adapter, name)) for name, adapter, records in _solutions(work, judge, options)
    ]
    best = _nearest(candidates, judge.in_domain)
    tried: dict[str, Any] = {}
    if options.refine is not None:
        adapter, course = refine(judge, best.adapter, options, work.pairs, work.progress)
        tried["refinement"] = course
        if isinstance(adapter, LodaAdapter):  # no change of weights: measured on activations
            records = measured_again(judge, work, adapter, best.records)
        else:
            records = remeasured(work.pairs, work.plan, adapter, best.records, work.progress)
        candidates.append(Candidate("refined", adapter, records, judge.figures(adapter, "refined")))
        best = _nearest(candidates, judge.in_domain)
    tried |= {"candidates": {candidate.name: candidate.kl for candidate in candidates}}
    return best, tried | {"control": {candidate.name: candidate.figures.control for candidate in candidates}}


def _solutions(work: Work, judge: Judge, options: Options) -> Iterator[tuple[str, Any, list[Record]]]:
    """The solutions of one size, each with its name: first the one that knows nothing of the text."""
    if options.to in VARIANTS:
        (adapter, records), fitted = solve_loda(judge, work, options)
    else:
        assert work.solver is not None
        adapter, records = work.solver(work.pairs, work.plan, options, work.stored, work.progress)
    if not any(record.status == "factored" and record.energy for record in records):
        raise AdaptError(f"{work.pairs.source.origin}: no targeted matrix changed; there is nothing to calibrate, convert without --calib")
    yield "data-free", adapter, records
    if options.to in VARIANTS:
        yield "fitted", *fitted
    elif whitened := WHITENED.get(options.to):
        find_moments = functools.partial(moments_of, work.pairs, judge.stage, judge.text, work.progress)
        yield "whitened", *whitened(work, find_moments, options, (adapter, records))


def _nearest(candidates: list[Candidate], in_domain: bool) -> Candidate:
    """The candidate of least divergence on held-out text; the first, data-free one where what others gain there is no gain elsewhere and
    the text is none that the fine-tune is for."""
    first = candidates[0].figures

    def counts(figures: Figures) -> bool:
        gain, elsewhere = (1 - now / max(before, _NOTHING) for now, before in ((figures.kl, first.kl), (figures.control, first.control)))
        return elsewhere >= _SHARED * gain

    return min((c for c in candidates if in_domain or c is candidates[0] or counts(c.figures)), key=lambda candidate: candidate.kl)


def _smallest(work: Work, judge: Judge, options: Options, target: float) -> tuple[Candidate, dict[str, Any], dict[str, float]]:
    """The candidate of the least rank within `target`: ranks are doubled until one is, and then halved towards it.

    That takes the divergence to fall with the rank; the rank that is returned was measured, whatever lies below it.
    """
    most = largest_rank(work.plan, options)
    found: dict[int, tuple[Candidate, dict[str, Any]]] = {}

    def within(rank: int) -> bool:
        found[rank] = _best(work, judge, options.changed(rank=rank, target_kl=None))
        return found[rank][0].kl <= target

    low, high = 0, 1
    while not within(high):
        if high == most:
            least = min(candidate.kl for candidate, _ in found.values())
            raise AdaptError(f"--target-kl {target:g}: rank {most}, the largest, leaves {least:.4g} on held-out text; {_remedy(options)}")
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return *found[high], {str(rank): candidate.kl for rank, (candidate, _) in sorted(found.items())}


def _remedy(options: Options) -> str:
    if options.refine is None:
        return "refine it with --refine N, or factor more modules (--target-modules)"
    return "factor more modules (--target-modules), or exclude fewer"
