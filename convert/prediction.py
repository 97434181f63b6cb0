"""How large the output of a plan will be and how much memory it takes, before any work: estimates from shapes alone."""

from __future__ import annotations

import math
import os

from adapt_convert.convert.architectures import heads_of
from adapt_convert.convert.loda.replaced import is_replaced
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.side_by_side import DELTA_BYTES, IN_FLIGHT
from adapt_convert.formats.dtypes import bits_of
from adapt_convert.formats.loda_config import VARIANTS
from adapt_convert.formats.source import Source

_RUNTIME = 300 * 2**20  # bytes: Python with torch loaded
_HEADER = 120  # bytes of a safetensors header for one tensor


def predict(plan: Plan, source: Source, options: Options) -> tuple[int, int]:
    """Bytes of the written weights, and of peak memory, if every tensor of the plan changed."""
    item = _bytes_each(options.dtype or output_dtype(source))
    if options.to in VARIANTS:
        factors = sum(_loda_bytes(entry, options, item) for entry in plan.having("factor"))
    else:
        factors = int(options.budget or 0) or _factor_numbers(plan, options) * item
    stored = sum(_stored_bytes(entry, plan, options) for entry in plan.having("store"))
    work = max(_in_work(plan), _largest_stored(plan))
    headers = _HEADER * sum(2 if entry.action == "factor" else 1 for entry in plan.entries if entry.action != "drop")
    return factors + stored + headers, _RUNTIME + work + factors


def _factor_numbers(plan: Plan, options: Options) -> int:
    shapes = [entry.matrix_shape for entry in plan.having("factor")]
    if options.to == "lora":
        ranks = [_largest_rank(entry, options) for entry in plan.having("factor")]
        if options.consumer and options.consumer.uniform:  # smaller ranks are padded to the largest
            ranks = [max(ranks, default=0)] * len(ranks)
        return sum(rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True))
    if options.to == "latte":  # each matrix keeps its far side, each segment a basis of the near one
        wide = max(min(shape) for shape in shapes)
        segments = options.segments if isinstance(options.segments, int) else 1 if options.segments is None else len(shapes)
        return (options.rank or wide) * (sum(max(shape) for shape in shapes) + segments * wide)
    heads = heads_of(plan.config)
    places = [entry.place for entry in plan.having("factor") if entry.place]
    layers = len({(place.block, place.layer) for place in places})
    attention = heads.query + heads.key_value + heads.size if heads else 0
    wide = max(max(shape) for shape in shapes)  # the MLP's width, or at least that of the residual stream
    return (options.rank or 0) * (attention + 2 * wide + 2 * layers + len({place.role for place in places}) + 2)


def _largest_rank(entry: Entry, options: Options) -> int:
    """The rank that a matrix can get; a share of the energy needs full rank at most."""
    own = entry.part.rank
    wanted = own if own is not None and options.keeps(own) else options.rank
    return min(wanted or max(entry.matrix_shape), *entry.matrix_shape)


def _loda_bytes(entry: Entry, options: Options, item: int) -> int:
    """One LoDA at most, with what replaces the weight: factors, or one bit for each entry."""
    rows, columns = entry.matrix_shape
    rank = min(options.rank or 0, rows, columns)
    plus = 2 * rank * rank + rows if options.to.endswith("+") else 0
    replaced = is_replaced(entry, options)
    low_rank = min(options.base_rank or 0, rows, columns) * (rows + columns) if replaced else 0
    mask = (rows * columns + 7) // 8 if replaced and options.keep is not None else 0
    return item * (rank * (rows + columns) + plus + low_rank) + mask


def _stored_bytes(entry: Entry, plan: Plan, options: Options) -> int:
    # PEFT wants a shared value once for each module that shares it.
    copies = 1 + (len(plan.aliases(entry.name)) if options.to == "lora" else 0)
    return copies * _bytes(entry)


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
