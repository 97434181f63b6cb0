"""How large the output of a plan will be and how much memory it takes, before any work: estimates from shapes alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.architectures import heads_of
from adapt_convert.convert.family import ATTENTION_ROLES, FUSED, MLP_ROLES, WRITERS
from adapt_convert.convert.loda.replaced import is_replaced
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.side_by_side import DELTA_BYTES, IN_FLIGHT
from adapt_convert.formats.dtypes import bits_of
from adapt_convert.formats.loda_config import VARIANTS
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


def predict(plan: Plan, source: Source, options: Options) -> Prediction:
    """The file and the memory of a conversion, from headers."""
    item = 4 if _may_need_float32(source, options) else _bytes_each(options.dtype or output_dtype(source))
    factors, modules = _factors(plan, options, item)
    if options.budget is not None:
        factors = min(factors, int(options.budget))
    stored = [_stored(entry, plan, options) for entry in plan.having("store")] + _zero_biases(plan, options)
    header = _FILE + sum(_ROW + len(module) for module in (*modules, *(module for module, _ in stored)))
    work = max(_in_work(plan), _largest_stored(plan))
    size = factors + sum(size for _, size in stored) + header
    return Prediction(size, _is_bound(source, options), _RUNTIME + work + factors, options.calib is not None)


def _is_bound(source: Source, options: Options) -> bool:
    """Whether ranks may turn out smaller than what a size is predicted from: looked for, or limited by a source of an unknown rank."""
    if options.rank is None or options.construction == "score" or _may_need_float32(source, options):
        return True  # a score construction leaves out what it cannot hold
    if options.to == "lora":
        return source.kind == "method"
    return source.kind != "checkpoint" and options.to != "lorta"


def _may_need_float32(source: Source, options: Options) -> bool:
    """Whether a fit may show that its factors have to be stored more precisely than the source is."""
    return options.to == "lorta" and options.dtype is None and output_dtype(source) != "float32"


def _factors(plan: Plan, options: Options, item: int) -> tuple[int, list[str]]:
    """Bytes of the tensors that are not stored exactly, and for each of these the module in its name; `item` bytes for each number."""
    entries = plan.having("factor")
    modules = [entry.module for entry in entries]
    if options.to in VARIANTS:
        return sum(_loda_bytes(entry, options, item) for entry in entries), 2 * modules
    if options.to == "latte":
        return _latte_factors(entries, options, item)
    if options.to == "lorta":
        return _lorta_factors(plan, options, item)
    ranks = [_largest_rank(entry, options) for entry in entries]
    if options.consumer and options.consumer.uniform:  # smaller ranks are padded to the largest
        ranks = [max(ranks, default=0)] * len(ranks)
    return item * sum(rank * sum(entry.matrix_shape) for rank, entry in zip(ranks, entries, strict=True)), 2 * modules


def _latte_factors(entries: list[Entry], options: Options, item: int) -> tuple[int, list[str]]:
    """Each matrix keeps its far side, each segment a basis of the residual stream, in float32."""
    sides = [entry.matrix_shape[:: 1 if entry.place and entry.place.role in WRITERS else -1] for entry in entries]  # (near, far)
    wide = max(near for near, _ in sides)
    segments = options.segments if isinstance(options.segments, int) else 1 if options.segments is None else len(entries)
    size = item * sum(far for _, far in sides) + 4 * segments * wide  # of each rank
    return (options.rank or wide) * size, [entry.module for entry in entries] + [""] * segments


def _lorta_factors(plan: Plan, options: Options, item: int) -> tuple[int, list[str]]:
    """A tensor of the attention and one of the MLP, each with its modes (convert/lorta/solver.py)."""
    entries = [entry for entry in plan.having("factor") if entry.place]
    rank = options.rank or max(min(entry.matrix_shape) for entry in entries)
    heads = heads_of(plan.config)
    numbers = tensors = 0
    for block in (ATTENTION_ROLES, MLP_ROLES):
        held = [(entry, place) for entry in entries if (place := entry.place) and set(FUSED.get(place.role, (place.role,))) <= set(block)]
        if not held:
            continue
        roles = {role for _, place in held for role in FUSED.get(place.role, (place.role,))}
        layers = len({(place.block, place.layer) for _, place in held})
        near, far = max((entry.matrix_shape[:: 1 if place.role in WRITERS else -1] for entry, place in held), key=max)
        if block is ATTENTION_ROLES and heads:
            groups = {heads.key_value if role in "kv" else heads.query for role in roles}
            far = heads.size
        else:  # the width of the MLP is one wide head
            groups = {1}
            far //= 2 if any(place.role in FUSED for _, place in held) else 1
        numbers += near + far + layers + len(roles) + sum(groups)
        tensors += 4 + len(groups)
    return rank * numbers * item, [""] * tensors


def _largest_rank(entry: Entry, options: Options) -> int:
    """The rank that a matrix can get; what comes in factors has no more than theirs, and a share of the energy needs full rank at most."""
    own, full = entry.part.rank, min(entry.matrix_shape)
    if own is None:
        return min(options.rank or full, full)
    return min(own if options.keeps(own) else options.rank or own, own, full)


def _loda_bytes(entry: Entry, options: Options, item: int) -> int:
    """One LoDA at most, with what replaces the weight: factors, or one bit for each entry."""
    rows, columns = entry.matrix_shape
    rank = min(options.rank or rows, rows, columns)
    plus = 2 * rank * rank + rows if options.to.endswith("+") else 0
    replaced = is_replaced(entry, options)
    low_rank = min(options.base_rank or 0, rows, columns) * (rows + columns) if replaced else 0
    mask = (rows * columns + 7) // 8 if replaced and options.keep is not None else 0
    return item * (rank * (rows + columns) + plus + low_rank) + mask


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
