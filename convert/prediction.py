"""How large the output of a plan will be and how much memory it takes, before any work: estimates from shapes alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.family import FUSED
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.side_by_side import DELTA_BYTES, IN_FLIGHT
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.dtypes import bits_of
from adapt_convert.formats.source import Source

_RUNTIME = 300 * 2**20  # bytes: Python with torch loaded
_FILE = 128  # bytes of a safetensors file beside its tensors and their rows in the header
_ROW = 130  # bytes of one tensor in the header, its module's name left aside


@dataclass(frozen=True)
class Prediction:
    """What a plan would write and take if every tensor of it changed: `bytes` of the weights file, and of `peak_memory`.

    `at_most` says that `bytes` are a bound which what is written may stay far below, because only the work shows the ranks.
    `runs_models` says that models are run, one at a time in float32, whose memory `peak_memory` does not count.
    """

    bytes: int
    at_most: bool
    peak_memory: int
    runs_models: bool

    def to_json(self) -> dict[str, Any]:
        """Without a figure for the memory where it would be that of the smaller part."""
        peak = None if self.runs_models else self.peak_memory
        return {"predicted_bytes": self.bytes, "predicted_at_most": self.at_most, "predicted_peak_memory": peak}


def predict(plan: Plan, base: Checkpoint, source: Source, options: Options) -> Prediction:
    """The file and the memory of a conversion, from headers; a budget of a target of one rank is settled before."""
    stored = [_stored(entry, plan, options) for entry in _kept_whole(plan, base, source, options)] + _zero_biases(plan, options)
    if options.to == "lora" or options.construction == "score":
        item = _bytes_each(output_dtype(options, source))
        factors, modules = _lora_factors(plan, base, options, item) if options.to == "lora" else _score_factors(plan, options, item)
        header = _FILE + sum(_ROW + len(module) for module in modules)
    else:
        factors, header = _of_one_rank(plan, base, source, options), 0
    header += sum(_ROW + len(module) for module, _ in stored)
    work = max(_in_work(plan), _largest_stored(plan))
    size = factors + sum(size for _, size in stored) + header
    return Prediction(size, _is_bound(source, options), _RUNTIME + work + factors, options.calib is not None)


def _of_one_rank(plan: Plan, base: Checkpoint, source: Source, options: Options) -> int:
    """The file of a target that has one rank for all matrices, without what is stored exactly: at the largest rank if it is looked for."""
    from adapt_convert.convert.rank_for_budget import largest_rank, sizes_by_rank  # needs torch

    sized = options.changed(dtype="float32") if _may_need_float32(source, options) else options
    return sizes_by_rank(plan, base, source, sized)(options.rank or largest_rank(plan, options))


def _kept_whole(plan: Plan, base: Checkpoint, source: Source, options: Options) -> list[Entry]:
    """The tensors that are stored exactly: in a LatTE not those that its blocks and biases contain."""
    if options.to != "latte" or options.construction == "score":
        return plan.having("store")
    from adapt_convert.convert.rank_for_budget import folded_into_latte  # needs torch

    folded = folded_into_latte(plan, base, source)
    return [entry for entry in plan.having("store") if entry.name not in folded]


def _is_bound(source: Source, options: Options) -> bool:
    """Whether ranks may turn out smaller than what a size is predicted from: looked for, or limited by a source of an unknown rank."""
    if options.rank is None or options.construction == "score" or _may_need_float32(source, options):
        return True  # a score construction leaves out what it cannot hold
    if options.to.endswith("+"):
        return True  # a map that does not help is left out
    if options.to == "lora":
        return source.kind == "method"
    return source.kind != "checkpoint" and options.to != "lorta"


def _may_need_float32(source: Source, options: Options) -> bool:
    """Whether a fit may show that its factors have to be stored more precisely than the source is."""
    return options.to == "lorta" and options.dtype is None and output_dtype(options, source) != "float32"


def _lora_factors(plan: Plan, base: Checkpoint, options: Options, item: int) -> tuple[int, list[str]]:
    """Bytes of the factors, of `item` each number, and for each of their tensors the module in its name."""
    entries = plan.having("factor")
    ranks, modules = [_largest_rank(entry, options) for entry in entries], [entry.module for entry in entries]
    largest = max(ranks, default=0)
    if options.consumer and options.consumer.uniform:  # smaller ranks are padded to the largest
        ranks = [largest] * len(ranks)
    sizes = [item * rank * sum(entry.matrix_shape) for rank, entry in zip(ranks, entries, strict=True)]
    total = sum(sizes) if options.budget is None else min(sum(sizes), int(options.budget))
    for size, entry in zip(sizes, entries, strict=True):  # a shared table is written once for each module
        aliases = [name.rpartition(".")[0] for name in plan.aliases(entry.name)]
        total, modules = total + size * len(aliases), modules + aliases
    if options.consumer and largest:
        from adapt_convert.convert.fitting import absent_modules  # needs torch

        filled = absent_modules((entry.module for entry in entries if entry.kind == "matrix"), plan, options.consumer)
        total += sum(item * largest * sum(base.infos[plan.base_keys[f"{module}.weight"]].shape) for module in filled)
        modules += filled
    return total, 2 * modules


def _score_factors(plan: Plan, options: Options, item: int) -> tuple[int, list[str]]:
    """The same of a score construction: a pair for each of q, k and v, also where these are parts of one matrix."""
    entries = plan.having("factor")
    rank = options.rank or max(min(entry.matrix_shape) for entry in entries)
    parts = [len(FUSED.get(entry.place.role, ("",))) if entry.place else 1 for entry in entries]
    sizes = (rows + count * columns for (rows, columns), count in zip((e.matrix_shape for e in entries), parts, strict=True))
    return item * rank * sum(sizes), [e.module for e, count in zip(entries, parts, strict=True) for _ in range(2 * count)]


def _largest_rank(entry: Entry, options: Options) -> int:
    """The rank that a matrix can get; what comes in factors has no more than theirs, and a share of the energy needs full rank at most."""
    own, full = entry.part.rank, min(entry.matrix_shape)
    if own is None:
        return min(options.rank or full, full)
    return min(own if options.keeps(own) else options.rank or own, own, full)


def _stored(entry: Entry, plan: Plan, options: Options) -> tuple[str, int]:
    """The module of what is stored exactly, and its bytes."""
    if options.to != "lora":
        return entry.module, _bytes(entry)
    if _is_bias(entry, plan):  # `lora_B.bias`, in float32
        return entry.module, 4 * math.prod(entry.part.shape)
    return entry.module, _bytes(entry) * (1 + len(plan.aliases(entry.name)))  # PEFT wants a shared value once for each module


def _zero_biases(plan: Plan, options: Options) -> list[tuple[str, int]]:
    """The zeros that PEFT's `lora_bias`, one switch for a whole adapter, wants beside factors whose bias did not change."""
    biased = {entry.module for entry in plan.having("store") if options.to == "lora" and _is_bias(entry, plan)}
    return [(e.module, 4 * e.matrix_shape[0]) for e in plan.having("factor") if e.module not in biased] if biased else []


def _is_bias(entry: Entry, plan: Plan) -> bool:
    return entry.name == f"{entry.module}.bias" and plan.is_factored(entry.module)


def _in_work(plan: Plan) -> int:
    """The differences that are held at a time: one per thread, and one for the disk."""
    sizes = sorted((DELTA_BYTES * math.prod(entry.part.shape) for entry in plan.having("factor")), reverse=True)
    return max(min(IN_FLIGHT, sum(sizes[: _threads() + 1])), *sizes[:1], 0)


def _threads() -> int:
    """As many as torch will use, which need not be asked for that: it takes the number from the same place."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else os.cpu_count() or 1


def _largest_stored(plan: Plan) -> int:
    """What is stored whole is read whole when it is written; everything else that is not factored passes in blocks."""
    return max((_bytes(entry) for entry in plan.having("store")), default=0)


def _bytes(entry: Entry) -> int:
    return math.prod(entry.part.shape) * _bytes_each(entry.part.dtype)


def _bytes_each(dtype: str) -> int:
    return (bits_of(dtype) or 0) // 8
