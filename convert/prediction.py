"""How large the output of a plan will be and how much memory it takes, before any work: estimates from shapes alone."""

from __future__ import annotations

import math

import torch

from adapt_convert.convert.architectures import heads_of
from adapt_convert.convert.options import DTYPES, Options
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.side_by_side import IN_FLIGHT
from adapt_convert.formats.safetensors_file import DTYPES as STORED_DTYPES
from adapt_convert.formats.source import Source

_RUNTIME = 300 * 2**20  # bytes: Python with torch loaded
_HEADER = 120  # bytes of a safetensors header for one tensor


def predict(plan: Plan, source: Source, options: Options) -> tuple[int, int]:
    """Bytes of the written weights, and of peak memory, if every tensor of the plan changed."""
    item = DTYPES[options.dtype or output_dtype(source)].itemsize
    factors = int(options.budget or 0) or _factor_numbers(plan, options) * item
    stored = sum(_stored_bytes(entry, plan, options) for entry in plan.having("store"))
    work = max(_in_work(plan), _largest_stored(plan))
    headers = _HEADER * sum(2 if entry.action == "factor" else 1 for entry in plan.entries if entry.action != "drop")
    return factors + stored + headers, _RUNTIME + work + factors


def _factor_numbers(plan: Plan, options: Options) -> int:
    shapes = [entry.matrix_shape for entry in plan.having("factor")]
    if options.to == "lora":  # a share of the energy needs full rank at most
        return sum(min(options.rank or max(shape), *shape) * sum(shape) for shape in shapes)
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


def _stored_bytes(entry: Entry, plan: Plan, options: Options) -> int:
    # PEFT wants a shared value once for each module that shares it.
    copies = 1 + (len(plan.aliases(entry.name)) if options.to == "lora" else 0)
    return copies * math.prod(entry.part.shape) * STORED_DTYPES[entry.part.dtype].itemsize


def _in_work(plan: Plan) -> int:
    """The float32 differences that are held at a time: one per thread, and one for the disk."""
    sizes = sorted((4 * math.prod(entry.part.shape) for entry in plan.having("factor")), reverse=True)
    return max(min(IN_FLIGHT, sum(sizes[: torch.get_num_threads() + 1])), *sizes[:1], 0)


def _largest_stored(plan: Plan) -> int:
    """What is stored whole is read whole when it is written; everything else that is not factored passes in blocks."""
    return max((_bytes(entry) for entry in plan.having("store")), default=0)


def _bytes(entry: Entry) -> int:
    return math.prod(entry.part.shape) * STORED_DTYPES[entry.part.dtype].itemsize if entry.part.dtype in STORED_DTYPES else 0
