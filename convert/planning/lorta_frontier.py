"""LoRTAs that could be written: a CP fit has no spectrum to be read off, so each rank is fitted, by the solver itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from adapt_convert.convert.lorta.solver import solve_lorta
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.planning.candidates import Candidate, candidate
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record

RANKS = (4, 16, 64)


def lorta_frontier(
    pairs: Pairs,
    plan: Plan,
    options: Options,
    stored: dict[Entry, float],
    rest: Sequence[Record],
    seconds: float,
    progress: Progress,
) -> Iterator[Candidate]:
    """Fits of rising rank; none begins later than `seconds` after the first, and 0 seconds leave them all out.

    What is captured is measured on the factors in the output dtype, so a conversion with the same options has the same figure.
    """
    deadline = time.monotonic() + seconds
    for rank in RANKS:
        if seconds == 0 or (rank > RANKS[0] and time.monotonic() > deadline):
            return
        adapter, records = solve_lorta(pairs, plan, options.changed(rank=rank), stored, progress)
        yield candidate(f"--rank {rank}", options, adapter, records, rest)
