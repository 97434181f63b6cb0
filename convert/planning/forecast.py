"""`adapt-convert plan`: what a fine-tune changed, which adapters could be made of it, and which one should be; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.convert.conversion import survey
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.planning.candidates import Candidate
from adapt_convert.convert.planning.change import MatrixChange, measure_changes
from adapt_convert.convert.planning.describe import describe_changes, full_bytes
from adapt_convert.convert.planning.latte_frontier import latte_frontier
from adapt_convert.convert.planning.lora_frontier import lora_frontier
from adapt_convert.convert.planning.lorta_frontier import RANKS as LORTA_RANKS
from adapt_convert.convert.planning.lorta_frontier import lorta_frontier
from adapt_convert.convert.planning.on_inputs import forecast_on_inputs
from adapt_convert.convert.planning.recommendation import recommend
from adapt_convert.convert.preflight import Entry, Plan, make_plan, require_factors
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.report import Record
from adapt_convert.formats.atomic import write_text
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.plan_html import plan_page
from adapt_convert.formats.source import Source


@dataclass(frozen=True)
class Forecast:
    """The outcome of `plan`: `data` is plain, as `--json` prints it (docs/planning.md has its keys)."""

    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.data

    def save_html(self, path: str | Path) -> Path:
        """Write the forecast as one self-contained page."""
        write_text(Path(path), plan_page(self.data))
        return Path(path)


@dataclass(frozen=True)
class _Target:
    """One target's plan of the pair, and what its survey found."""

    options: Options
    plan: Plan
    stored: dict[Entry, float]
    rest: Sequence[Record]


def plan(
    base: str | Path,
    source: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    task: str | None = None,
    capture: float = 0.9,
    fit_seconds: float = 120.0,
    progress: Progress = silent,
    **options: Any,
) -> Forecast:
    """Forecast the conversions of a fine-tune (or adapter) of `base` from its weights alone, writing nothing.

    `capture` is the share of the change of all matrices that the recommended adapter has to hold, above 0 and at most 1. No LoRTA
    fit begins later than `fit_seconds` after the first; 0 leaves LoRTAs out. `task` chooses one adapter of a shared LoRA, by name or
    number. `options` are `target_modules`, `exclude`, `dtype`, `device` and `seed` of `Options`, and `calib` and `calib_tokens` for what
    reaches the outputs on a text (`on_inputs`). Raises `AdaptError`, also when nothing changed.
    """
    if not 0 < capture <= 1:
        raise AdaptError(f"--capture {capture}: must be above 0 and at most 1")
    if not fit_seconds >= 0:
        raise AdaptError(f"--fit-seconds {fit_seconds}: must be a number of seconds, 0 or more")
    chosen = Options(to="lora", **options)
    chosen.require_text()
    opened_base, opened_source = open_pair(base, source, revision, base_revision, task)
    pairs = Pairs(opened_base, opened_source, chosen.torch_device())
    lora = _target(opened_base, opened_source, pairs, chosen, progress)
    changes = measure_changes(pairs, lora.plan, chosen.seed, progress)
    if not any(change.energy > 0 for change in changes):
        raise AdaptError(
            f"{opened_source.origin}: none of the targeted matrices differs from {opened_base.origin}; there is nothing to plan"
        )
    # Before the long work, as a text may be refused.
    on_inputs = forecast_on_inputs(pairs, lora.plan, chosen, progress) if chosen.calib is not None else None
    found, left_out = _frontiers(pairs, lora, changes, fit_seconds, progress)
    whole = full_bytes(opened_source, changes, lora.stored)
    return Forecast(
        {
            "base": opened_base.origin,
            "source": opened_source.origin,
            **describe_changes(lora.plan, changes, lora.stored, lora.rest),
            "full_bytes": whole,
            "capture": capture,
            "candidates": [one.to_json() for one in found],
            "left_out": left_out,
            "on_inputs": on_inputs,
            "recommendation": recommend(found, capture, whole, opened_source.kind == "checkpoint"),
            "seed": chosen.seed,
        }
    )


def _target(base: Checkpoint, source: Source, pairs: Pairs, options: Options, progress: Progress) -> _Target:
    made = make_plan(base, source, options)
    require_factors(made, base, options)
    stored, records = survey(pairs, made, options, progress)
    return _Target(options, made, stored, records)


def _frontiers(
    pairs: Pairs, lora: _Target, changes: Sequence[MatrixChange], fit_seconds: float, progress: Progress
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates of all targets, and for a target or rank that has none the reason."""
    found, left_out = [], {}
    families: dict[str, Callable[[_Target], Iterator[Candidate]]] = {
        "lora": lambda t: lora_frontier(pairs, t.plan, t.options, t.stored, t.rest, changes),
        "latte": lambda t: latte_frontier(pairs, t.plan, t.options, t.stored, t.rest, progress),
        "lorta": lambda t: lorta_frontier(pairs, t.plan, t.options, t.stored, t.rest, fit_seconds, progress),
    }
    for name, frontier in families.items():
        try:  # an architecture that LatTE or LoRTA cannot hold is no failure of the plan
            target = lora if name == "lora" else _target(pairs.base, pairs.source, pairs, _options_of(name, lora.options), progress)
            found += list(frontier(target))
        except AdaptError as error:
            if name == "lora":
                raise
            left_out[name] = str(error)
    fitted = sum(one.target == "lorta" for one in found)
    if "lorta" not in left_out and fitted < len(LORTA_RANKS):
        ranks = ", ".join(map(str, LORTA_RANKS[fitted:]))
        left_out["lorta"] = f"rank {ranks} not fitted: --fit-seconds {fit_seconds:g} were over"
    return found, left_out


def _options_of(name: str, options: Options) -> Options:
    """A LoRTA holds the attention alone unless told otherwise; here it is held against targets that hold every matrix."""
    modules = options.target_modules or (("all-linear",) if name == "lorta" else ())
    return options.changed(to=name, target_modules=modules)
