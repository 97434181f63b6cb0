"""A conversion that may look at text: solve with and without it, refine, and keep what is nearest to the fine-tune on rows held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from adapt_convert.convert.calibration.judge import Judge, opened_judge
from adapt_convert.convert.calibration.moments import Moments, moments_of
from adapt_convert.convert.calibration.remeasure import remeasured
from adapt_convert.convert.calibration.whitened_lora import solve_whitened_lora
from adapt_convert.convert.loda.solver import measured_again, solve_loda
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.refinement.refine import refine
from adapt_convert.convert.report import Record
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda import LodaAdapter
from adapt_convert.formats.loda_config import VARIANTS

Solved = tuple[Any, list[Record]]
_Whitened = Callable[[Pairs, Moments, Plan, Options, dict[Entry, float], Progress], Solved]
FITTED: dict[str, Callable[..., Solved]] = dict.fromkeys(VARIANTS, solve_loda)
WHITENED: dict[str, _Whitened] = {"lora": solve_whitened_lora}


@dataclass(frozen=True)
class Work:
    """One conversion as far as it has been planned: what every solver is given, and the target's own solver without text."""

    pairs: Pairs
    plan: Plan
    stored: dict[Entry, float]
    solver: Callable[..., Solved] | None  # None for a target that has no solution without text
    progress: Progress


@dataclass(frozen=True)
class Candidate:
    """A finished adapter with its records, and its divergence from the fine-tune on the held-out rows, nats per prediction."""

    name: str
    adapter: Any
    records: list[Record]
    kl: float


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
            "kl_of_base": judge.base_kl,
        }
        if options.target_kl is None:
            best, tried = _best(work, judge, options)
        else:
            best, tried, searched = _smallest(work, judge, options, options.target_kl)
            about["searched"] = searched
        return best.adapter, best.records, about | {"chosen": best.name, "kl": best.kl} | tried


def _best(work: Work, judge: Judge, options: Options) -> tuple[Candidate, dict[str, Any]]:
    """The best candidate of one size, and the figures of all."""
    given = (work.pairs, work.plan, options, work.stored, work.progress)
    name = "data-free" if work.solver else "fitted"
    adapter, records = work.solver(*given) if work.solver else FITTED[options.to](judge, *given)
    if not any(record.status == "factored" and record.energy for record in records):
        raise AdaptError(f"{work.pairs.source.origin}: none of the targeted matrices changed; there is nothing to factor")
    candidates = [Candidate(name, adapter, records, judge.kl(adapter, name))]
    whitened = WHITENED.get(options.to)
    if whitened:
        modules = [entry.module for entry in work.plan.having("factor") if entry.kind == "matrix"]
        moments = moments_of(work.pairs, modules, judge.stage, judge.text, work.progress)
        adapter, records = whitened(work.pairs, moments, work.plan, options, work.stored, work.progress)
        candidates.append(Candidate("whitened", adapter, records, judge.kl(adapter, "whitened")))
    best = min(candidates, key=lambda candidate: candidate.kl)
    tried: dict[str, Any] = {}
    if options.refine is not None:
        adapter, course = refine(judge, best.adapter, options, work.pairs, work.progress)
        tried["refinement"] = course
        if isinstance(adapter, LodaAdapter):  # measured on activations, as it is no change of weights
            records = measured_again(judge, work.pairs, work.plan, adapter, best.records, work.progress)
        else:
            records = remeasured(work.pairs, work.plan, adapter, best.records, work.progress)
        candidates.append(Candidate("refined", adapter, records, judge.kl(adapter, "refined")))
        best = min(candidates, key=lambda candidate: candidate.kl)
    return best, {"candidates": {candidate.name: candidate.kl for candidate in candidates}} | tried


def _smallest(work: Work, judge: Judge, options: Options, target: float) -> tuple[Candidate, dict[str, Any], dict[str, float]]:
    """The candidate of the least rank within `target`: ranks are doubled until one is, and then halved towards it.

    That takes the divergence to fall with the rank; the rank that is returned was measured, whatever lies below it.
    """
    most = max(min(entry.matrix_shape) for entry in work.plan.having("factor"))
    found: dict[int, tuple[Candidate, dict[str, Any]]] = {}

    def within(rank: int) -> bool:
        found[rank] = _best(work, judge, replace(options, rank=rank, target_kl=None))
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
