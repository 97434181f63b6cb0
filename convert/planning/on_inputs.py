"""The change as it reaches the outputs of the matrices: spectra of `D L`, where `L L^T = E[x x^T]` over a calibration text.

`E||D x||^2 = ||D L||_F^2`, and by Eckart and Young no LoRA of rank r keeps more of it than the r largest singular values of `D L`, which is
what the whitened solver of `delta --calib` keeps.
"""

from __future__ import annotations

from typing import Any

from adapt_convert.convert.calibration.judge import opened_judge
from adapt_convert.convert.calibration.moments import moments_of
from adapt_convert.convert.calibration.whitened_lora import WhitenedPairs, modules_with_inputs
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.planning.change import captured_by_rank, kind_of, mean_effective_rank, measure_changes
from adapt_convert.convert.planning.lora_frontier import RANKS
from adapt_convert.convert.preflight import Plan
from adapt_convert.convert.progress import Progress


def forecast_on_inputs(pairs: Pairs, plan: Plan, options: Options, progress: Progress) -> dict[str, Any]:
    """What the matrices' outputs change on the text of `options.calib`, by kind, and the share that whitened LoRAs keep, by rank.

    Runs both models. Raises `AdaptError` for text or models that cannot be run.
    """
    modules = modules_with_inputs(plan)
    with opened_judge(pairs, options, progress) as judge:
        moments = moments_of(pairs, judge.stage, judge.text, progress, modules, {})
        about = {"text": judge.text.name, "tokens": judge.text.tokens, "kl_of_base": judge.base.kl}
        changes = measure_changes(WhitenedPairs(pairs, moments), plan, options.seed, progress, rounding=False)
    changes = [change for change in changes if change.energy > 0]
    total = sum(change.energy for change in changes)
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kind_of(change.entry) for change in changes):
        own = [change for change in changes if kind_of(change.entry) == kind]
        kinds[kind] = {
            "share": sum(change.energy for change in own) / total,
            "effective_rank": mean_effective_rank(own),
            "captured_by_rank_16": captured_by_rank(own, 16),
        }
    largest = max(min(change.shape) for change in changes)
    kept = {str(rank): captured_by_rank(changes, rank) for rank in RANKS if rank <= largest}
    return about | {"kinds": kinds, "lora_by_rank": {rank: share for rank, share in kept.items() if share is not None}}
