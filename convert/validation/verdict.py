"""Whether a candidate passes: thresholds, and the one line for each that fails."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapt_convert.convert.validation.adapter_weights import Holdings
from adapt_convert.convert.validation.fidelity import Fidelity
from adapt_convert.formats.errors import AdaptError

DEFAULT_MIN_RECOVERED = 0.5
TRUSTED = 0.95  # recovered share above which the function speaks for itself, whatever the weights look like
WEAK = 1.5  # a candidate that would have to grow by this factor to fit best has lost a scale somewhere
STRONG = 1.2  # and one that would have to shrink by this factor has gained one; a projection never has to
AWAY = -0.1  # captured energy of a matrix that is clearly moved away from the fine-tune; rounding alone leaves less


@dataclass(frozen=True)
class Thresholds:
    """`min_recovered` and `min_top1` are shares; `max_kl` in nats per token; `max_slowdown` a ratio of times to the base's."""

    min_recovered: float = DEFAULT_MIN_RECOVERED
    max_kl: float | None = None
    min_top1: float | None = None
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        if not -math.inf < self.min_recovered <= 1:
            raise AdaptError(f"--min-recovered {self.min_recovered}: is a share, at most 1")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise AdaptError(f"--min-top1 {self.min_top1}: is a share, from 0 to 1")
        for name in ("max_kl", "max_slowdown"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise AdaptError(f"--{name.replace('_', '-')} {value}: must be a number of at least 0")


def fidelity_failures(thresholds: Thresholds, found: Fidelity, base: Fidelity) -> list[str]:
    """One line for each threshold that the outputs miss; a figure that is not finite misses all of them."""
    reasons = []
    divergence = found.kl if found.kl is not None else found.error
    of_base = base.kl if base.kl is not None else base.error
    name = "KL" if found.kl is not None else "output error"
    assert divergence is not None
    assert of_base is not None
    if not math.isfinite(divergence):
        return [f"{name} to the fine-tune is not finite: the candidate's outputs are NaN or infinite"]
    if not divergence < of_base:
        reasons.append(f"{name} {divergence:.4g} is not below the base's {of_base:.4g}")
    if found.recovered is not None and not found.recovered >= thresholds.min_recovered:
        reasons.append(f"recovered {found.recovered:.4f} < {thresholds.min_recovered:g} (--min-recovered)")
    if thresholds.max_kl is not None:
        kl = found.kl_upper
        if kl is None:
            raise AdaptError("--max-kl: this model has no distribution to compare; use --min-recovered")
        if not kl <= thresholds.max_kl:
            reasons.append(f"KL {kl:.4g} > {thresholds.max_kl:g} (--max-kl)")
    if thresholds.min_top1 is not None:
        if found.top1 is None:
            raise AdaptError("--min-top1: this model has no classes to compare; use --min-recovered")
        if not found.top1 >= thresholds.min_top1:
            reasons.append(f"top-1 agreement {found.top1:.4f} < {thresholds.min_top1:g} (--min-top1)")
    return reasons


def weight_failures(holdings: Holdings, ignored: tuple[str, ...], recovered: float | None, is_adapter: bool) -> list[str]:
    """Signs of a broken adapter that a lenient threshold on the outputs would let pass.

    An adapter whose scale was halved still recovers about three quarters of the KL, as the KL grows with the square of what
    is missing: no threshold on the outputs tells it from an honest small adapter, its weights do. What only shows in single matrices
    or as too much is asked of adapters alone, as a merge in half precision adds the noise of its rounding to small changes.
    """
    reasons = []
    if ignored:
        more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        reasons.append(f"peft ignores tensors of the adapter: {ignored[0]}{more}")
    if holdings.damage:
        reasons.append(holdings.damage)
    if recovered is not None and recovered >= TRUSTED:
        return reasons
    if holdings.record_errors:
        more = f"; {len(holdings.record_errors) - 1} more" if len(holdings.record_errors) > 1 else ""
        reasons.append(f"not what was converted: {holdings.record_errors[0]}{more}")
    if holdings.refined:  # what its weights should be like, the record above has said
        return reasons
    if holdings.strength is not None and holdings.strength >= WEAK:
        reasons.append(f"acts at 1/{holdings.strength:.2f} of the strength that fits the fine-tune; is its scale (alpha / r) right?")
    captured = holdings.captured_of_adapted
    if captured is not None and captured < 0:
        reasons.append(f"moves the matrices it adapts away from the fine-tune (captured energy {captured:.1%}); are its layers in order?")
    return reasons + (_adapter_failures(holdings) if is_adapter else [])


def _adapter_failures(holdings: Holdings) -> list[str]:
    reasons = []
    if holdings.strength is not None and 0 < holdings.strength <= 1 / STRONG:
        times = 1 / holdings.strength
        reasons.append(f"acts at {times:.2f} times the strength that fits the fine-tune; is its scale (alpha / r) right?")
    worst = holdings.least_captured
    if worst is not None and worst[1] < AWAY:
        reasons.append(f"moves {worst[0]} away from the fine-tune (captured energy {worst[1]:.1%}); are its factors whole and in order?")
    if holdings.zeroed:
        more = f" and {len(holdings.zeroed) - 1} more" if len(holdings.zeroed) > 1 else ""
        reasons.append(f"the factors of {holdings.zeroed[0]}{more} are all zero, where the fine-tune changed")
    return reasons
