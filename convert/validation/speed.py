"""How fast the models run: every contender in every round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.conversion import peak_memory
from adapt_convert.convert.validation.candidates import Contender, Stage
from adapt_convert.convert.validation.live_model import Task
from adapt_convert.convert.validation.outputs import Batch, continue_greedily, run
from adapt_convert.formats.errors import AdaptError

ROUNDS = 5
NEW_TOKENS = 16


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Speed:
    """`prefill` in tokens (or images) per second; `per_token` in seconds per output token, None where nothing is generated;
    `memory` in bytes: peak of the device's allocator on a GPU, resident size of the process on a CPU; `load` and `switch` in
    seconds: putting it on for the first time, and again later when another contender was there (median).

    `rows` of `length` tokens each (1 for an image) ran at a time. `slowdown` is the larger of the two ratios of times to the
    base's; `verdict` says whether it is within the threshold.
    """

    prefill: Spread
    per_token: Spread | None
    memory: int
    load: float
    switch: float | None
    rows: int
    length: int
    slowdown: float
    verdict: bool | None

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill_tokens_per_second": self.prefill.to_json(),
            "seconds_per_output_token": self.per_token.to_json() if self.per_token else None,
            "memory_bytes": self.memory,
            "load_seconds": self.load,
            "switch_seconds": self.switch,
            "rows": self.rows,
            "length": self.length,
            "slowdown": self.slowdown,
            "verdict": {True: "pass", False: "fail", None: None}[self.verdict],
        }


@dataclass(frozen=True)
class Work:
    """What is timed: `batch`, and for a causal model `NEW_TOKENS` more, within the `positions` that it has (None: no limit)."""

    batch: Batch
    task: Task
    positions: int | None

    @property
    def prompt(self) -> Tensor | None:
        """Token ids `(rows, length)` that leave room for new ones; None for a model that does not write."""
        if self.task != "causal":
            return None
        room = max(1, self.positions - NEW_TOKENS) if self.positions else None
        return self.batch.inputs["input_ids"][:, :room]

    @property
    def new_tokens(self) -> int:
        prompt = self.prompt
        return min(NEW_TOKENS, self.positions - prompt.shape[1]) if self.positions and prompt is not None else NEW_TOKENS


@dataclass
class _Times:
    prefill: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    switch: list[float] = field(default_factory=list)
    memory: int = 0


def measure_speed(
    stage: Stage,
    contenders: Sequence[Contender],
    work: Work,
    max_slowdown: float | None,
    load_seconds: dict[Contender, float],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    rounds: int = ROUNDS,
) -> dict[Contender, Speed]:
    """Time all contenders, the base among them and first, on one batch.

    In every turn, prefill and decoding each have a run that does not count. Rounds go forth and back (A B C, C B A), so that
    no contender always follows the same other, and a checkpoint at the turn is loaded once for two rounds.
    """
    base = contenders[0]
    times = {contender: _Times() for contender in contenders}
    for number in progress(range(rounds), "timing"):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            seconds = stage.show(contender)
            if seconds:
                times[contender].switch.append(seconds)
            _take_turn(stage, work, times[contender])
    return {c: _speed(times[c], times[base], work, load_seconds.get(c, 0.0), max_slowdown if c != base else None) for c in contenders}


def _take_turn(stage: Stage, work: Work, times: _Times) -> None:
    device = stage.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def prefill() -> None:
        run(stage.model, work.batch, device)

    prefill()
    times.prefill.append(_seconds(prefill, device))
    if work.prompt is not None and work.new_tokens:
        prompt = work.prompt.to(device)
        with contextlib.suppress(AdaptError):  # keeps no cache: nobody would write with it
            _decode_seconds(stage.model, prompt, work.new_tokens, device)
            times.per_token.append(_decode_seconds(stage.model, prompt, work.new_tokens, device) / work.new_tokens)
    times.memory = max(times.memory, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory())


def _decode_seconds(model: Any, prompt: Tensor, count: int, device: torch.device) -> float:
    """Seconds for `count` steps after the first new token, which is the prefill's."""
    tokens = continue_greedily(model, prompt, count + 1)
    next(tokens)
    return _seconds(lambda: deque(tokens, maxlen=0), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    new_event: Callable[..., Any] = torch.cuda.Event
    begin, end = new_event(enable_timing=True), new_event(enable_timing=True)
    with torch.cuda.device(device):  # an event is recorded on the current device
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _speed(mine: _Times, base: _Times, work: Work, load: float, max_slowdown: float | None) -> Speed:
    prefill, tokens = Spread.of(mine.prefill), work.batch.rows * work.batch.length
    slowdown = prefill.median / statistics.median(base.prefill)
    if mine.per_token and base.per_token:
        slowdown = max(slowdown, statistics.median(mine.per_token) / statistics.median(base.per_token))
    return Speed(
        prefill=Spread(tokens / prefill.median, tokens / prefill.high, tokens / prefill.low),
        per_token=Spread.of(mine.per_token) if mine.per_token else None,
        memory=mine.memory,
        load=load,
        switch=statistics.median(mine.switch) if mine.switch else None,
        rows=work.batch.rows,
        length=work.batch.length,
        slowdown=slowdown,
        verdict=slowdown <= max_slowdown if max_slowdown is not None else None,
    )


def resident_memory() -> int:
    """Resident size of this process in bytes, now where the system says so, else its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory()
    import resource

    return pages * resource.getpagesize()
