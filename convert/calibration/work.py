"""What is handed from a conversion to its calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record

Solved = tuple[Any, list[Record]]  # an adapter of some target, and what became of every tensor


@dataclass(frozen=True)
class Work:
    """One conversion as far as it has been planned: what every solver is given, and the target's own solver without text."""

    pairs: Pairs
    plan: Plan
    stored: dict[Entry, float]
    solver: Callable[..., Solved]
    progress: Progress
