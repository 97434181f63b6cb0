"""A budget for the targets that have one rank for all matrices: the largest rank at which the adapter is within it.

What counts is the file without the tensors that are stored exactly, as their size is not for a rank to decide. Sizes follow from headers
alone, as if everything that is targeted had changed: an adapter of a change that left some of it alone is smaller.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapt_convert.convert.family import WRITERS
from adapt_convert.convert.latte.basis import cut
from adapt_convert.convert.latte.deltas import Effective
from adapt_convert.convert.loda.replaced import is_replaced
from adapt_convert.convert.lorta.solver import empty_lorta
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Plan, output_dtype
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment
from adapt_convert.formats.loda import KEEP, stored_shapes
from adapt_convert.formats.peft import PREFIX
from adapt_convert.formats.safetensors_file import LazyTensor, safetensors_size
from adapt_convert.formats.source import Source

_Make = Callable[[int], Mapping[str, Tensor | LazyTensor]]  # the tensors of a file by rank, without numbers in them


def settle_budget(plan: Plan, base: Checkpoint, source: Source, options: Options) -> tuple[Plan, Options]:
    """The options with the rank in the place of a budget, and the plan with a note that says so; both as they are without a budget
    or for a LoRA, which spends it matrix by matrix.

    The factors of a LoRTA are stored in float32 unless a dtype is given: its own need of precision shows only after the fit, too late
    for a budget. Raises `AdaptError` when rank 1 is beyond the budget.
    """
    options = options.with_budget_in_bytes(base.store.nbytes)
    if options.budget is None or options.to == "lora":
        return plan, options
    budget, most = int(options.budget), largest_rank(plan, options)
    if options.to == "lorta":
        options = options.changed(dtype=options.dtype or "float32")
    size = functools.cache(sizes_by_rank(plan, base, source, options))
    if size(1) > budget:
        raise AdaptError(f"--budget {budget} bytes: the smallest {options.to}, of rank 1, takes up to {size(1)}")
    low, high = 1, most + 1  # the rank `low` is within the budget, `high` is not or is none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    end = f"rank {high} would take {size(high)}" if high <= most else "no larger one is tried"
    note = f"--budget {budget} bytes: rank {low}, at most {size(low)} bytes beside what is stored exactly; {end}"
    return replace(plan, notes=(*plan.notes, note)), options.changed(budget=None, rank=low)


def largest_rank(plan: Plan, options: Options) -> int:
    """The rank beyond which an adapter of the plan is not made larger: full rank; of a LatTE the width of the residual stream."""
    entries = plan.having("factor")
    if options.to != "latte" or options.construction == "score":
        return max(min(entry.matrix_shape) for entry in entries)
    writes = (bool(entry.place and entry.place.role in WRITERS) for entry in entries)
    return max(entry.matrix_shape[0 if own else 1] for entry, own in zip(entries, writes, strict=True))


def sizes_by_rank(plan: Plan, base: Checkpoint, source: Source, options: Options) -> Callable[[int], int]:
    """The bytes of the adapter's file by rank, without what is stored exactly, of a target that has one rank for all matrices."""
    dtype = torch_dtype(output_dtype(options, source))
    if options.to == "lorta":
        make: _Make = functools.partial(_lorta, base, plan, options, dtype)
    elif options.to == "latte":
        make = functools.partial(_latte, Effective(Pairs(base, source, torch.device("cpu")), plan), options, dtype)
    else:
        make = functools.partial(_loda, plan, options, dtype)
    return lambda rank: safetensors_size(make(rank), {"format": "pt"})


def folded_into_latte(plan: Plan, base: Checkpoint, source: Source) -> frozenset[str]:
    """The parameters that a LatTE stores in its blocks and biases, which `sizes_by_rank` counts."""
    return Effective(Pairs(base, source, torch.device("cpu")), plan).folded()


def _lorta(base: Checkpoint, plan: Plan, options: Options, dtype: torch.dtype, rank: int) -> Mapping[str, Tensor | LazyTensor]:
    return empty_lorta(base, plan, options, rank, dtype).tensors()


def _latte(effective: Effective, options: Options, dtype: torch.dtype, rank: int) -> Mapping[str, Tensor | LazyTensor]:
    """A LatTE of blocks for every matrix that the source or the norm before it can change, with the biases that these may need."""
    task = LatteTask("")
    asked = effective.layers if options.segments == "auto" else options.segments  # a search ends at one segment per layer
    count = int(asked or (effective.layers if effective.layout.post_norms else 1))
    segments = [Segment(run.start, run.stop, _empty(effective.width, rank, torch.float32)) for run in cut(effective.layers, count)]
    for matrix in effective.matrices:
        rows, columns = effective.shape(matrix)
        if effective.may_change(matrix):
            if matrix.reads:
                task.readers[matrix.module] = _empty(rows, rank, dtype)
            else:
                task.writers[matrix.module] = _empty(rank, columns, dtype)
        if effective.may_need_bias(matrix):
            task.biases[matrix.module] = torch.empty(rows, device="meta")
    return LatteAdapter("", segments, [task]).tensors()


def _loda(plan: Plan, options: Options, dtype: torch.dtype, rank: int) -> Mapping[str, Tensor | LazyTensor]:
    """A LoDA of the largest maps that its variant allows."""
    tensors: dict[str, Tensor | LazyTensor] = {}
    for entry in plan.having("factor"):
        rows, columns = entry.matrix_shape
        replaced = is_replaced(entry, options)
        base_rank = options.base_rank if replaced and (options.base_rank or math.inf) * (rows + columns) < rows * columns else None
        masked = replaced and options.keep is not None
        shapes = stored_shapes((rows, columns), min(rank, rows, columns), options.to.endswith("+"), base_rank, masked)
        for name, shape in shapes.items():
            tensors[f"{PREFIX}{entry.module}.{name}"] = torch.empty(shape, dtype=torch.uint8 if name == KEEP else dtype, device="meta")
    return tensors


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")
