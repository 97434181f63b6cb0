"""How near a model's outputs are to the fine-tune's: means over a corpus with bootstrap intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapt_convert.convert.validation.outputs import Predictions
from adapt_convert.convert.validation.reference_outputs import Comparison

RESAMPLES = 2000
_Sums = NDArray[np.float64]
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class RowSums:
    """Sums over the predictions of every row of the corpus, float64 `(rows,)`; rows are what the bootstrap draws."""

    divergence: _Sums
    upper: _Sums
    agree: _Sums
    items: _Sums
    nll: _Sums
    targets: _Sums
    difference: float
    is_kl: bool


class Tally:
    """Collects the comparisons of one model, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[_Sums] = []
        self._difference = 0.0
        self._is_kl = True

    def add(self, predictions: Predictions, comparison: Comparison) -> None:
        row = predictions.row.cpu().numpy()
        targets = ~comparison.nll.isnan()
        columns = (
            *(comparison.divergence, comparison.upper, comparison.agree, targets.new_ones(len(row), dtype=comparison.nll.dtype)),
            *(comparison.nll.nan_to_num(0.0), targets.double()),
        )
        self._rows.append(np.stack([np.bincount(row, weights=column.numpy()) for column in columns], axis=1))
        # A NaN among the differences has to survive, which max() does not promise.
        worse = math.isnan(comparison.difference) or comparison.difference > self._difference
        self._difference = comparison.difference if worse else self._difference
        self._is_kl = predictions.is_logits

    def sums(self) -> RowSums:
        divergence, upper, agree, items, nll, targets = np.concatenate(self._rows).T
        return RowSums(divergence, upper, agree, items, nll, targets, self._difference, self._is_kl)


@dataclass(frozen=True)
class Fidelity:
    """One model against the fine-tune, over all predictions of a corpus.

    `kl` is the mean `KL(fine-tune || model)` in nats per prediction (`kl_upper` above it when only top-k logits were kept),
    None for a model without a distribution; `error` is then the mean squared distance of its features. `recovered` is the
    share of the base's divergence that is gone. `top1` is the share of equal most likely classes. Intervals are 95 %
    percentile bootstrap over rows, None for a single row.
    """

    kl: float | None
    kl_ci95: Interval
    kl_upper: float | None
    error: float | None
    recovered: float | None
    recovered_ci95: Interval
    top1: float | None
    top1_ci95: Interval
    perplexity: float | None
    max_logit_difference: float


UNKNOWN = Fidelity(None, None, None, None, None, None, None, None, None, math.nan)  # of a model that could not be run


def summarise(sums: RowSums, base: RowSums, seed: int) -> Fidelity:
    """The figures of one model; `base` are those of the untouched base on the same rows."""
    draws = _draws(len(sums.items), seed)
    divergence, items = float(sums.divergence.sum()), float(sums.items.sum())
    of_base = float(base.divergence.sum())
    ci = _interval(draws, sums.divergence, sums.items)
    ratio = _interval(draws, sums.divergence, base.divergence)
    return Fidelity(
        kl=divergence / items if sums.is_kl else None,
        kl_ci95=ci if sums.is_kl else None,
        kl_upper=float(sums.upper.sum()) / items if sums.is_kl else None,
        error=None if sums.is_kl else divergence / items,
        recovered=1 - divergence / of_base if of_base > 0 else None,
        recovered_ci95=(1 - ratio[1], 1 - ratio[0]) if ratio and of_base > 0 else None,
        top1=float(sums.agree.sum()) / items if sums.is_kl else None,
        top1_ci95=_interval(draws, sums.agree, sums.items) if sums.is_kl else None,
        perplexity=_perplexity(sums),
        max_logit_difference=sums.difference,
    )


def _perplexity(sums: RowSums) -> float | None:
    targets = float(sums.targets.sum())
    with np.errstate(over="ignore"):
        return float(np.exp(sums.nll.sum() / targets)) if targets else None


def _draws(rows: int, seed: int) -> NDArray[np.float64] | None:
    """How often each row is drawn in each resample, `(resamples, rows)`; the same for every model, so that they compare."""
    if rows < 2:
        return None
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)


def _interval(draws: NDArray[np.float64] | None, numerator: _Sums, denominator: _Sums) -> Interval:
    if draws is None:
        return None
    below = draws @ denominator
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (draws @ numerator)[below > 0] / below[below > 0]
    if not len(ratios) or not np.isfinite(ratios).all():
        return None
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
