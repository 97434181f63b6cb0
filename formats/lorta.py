"""LoRTA directories: one CP tensor for all layers, heads and matrices.

`adapter_model.safetensors` has the names of the reference implementation (github.com/ihounie/lorta): `lora_A (d, r)`,
`lora_B (r, d_h)`, `lora_C_h (H, r)`, `lora_C_l (L, r)`, `lora_C_m (M, r)`, scaled by `lora_alpha / r`. Two additions that the
reference lacks: `lora_C_hkv (H_kv, r)` for grouped-query attention, and a second tensor `lora_mlp_*` for the MLP.
`adapter_config.json` says with `blocks` which matrix each slice of a tensor is; a directory of the reference has no `blocks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.lorta.cp_tensor import CPFactors
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.peft import CONFIG, PREFIX, WEIGHTS, is_positive, scaling
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors
from adapt_convert.formats.source import LORTA, Part, Source, whole_part

Orientation = Literal["paper", "reference"]
_NAMES = {"attention": "lora_", "mlp": "lora_mlp_"}


@dataclass(frozen=True)
class Slot:
    """One slice of the tensor: rows `start:stop` of a module's `(out, in)` weight, the whole of it when they are None.

    `transposed` says that the residual side is the matrix's input side, so that the weight is the slice transposed. With a `stride`
    `start:stop` are the rows in the first group of heads, and those in each next group come `stride` rows later: q, k and v in turn.
    """

    module: str
    layer: int
    matrix: int
    transposed: bool
    start: int | None = None
    stop: int | None = None
    stride: int | None = None

    def rows(self, count: int) -> Tensor | None:
        """The numbers of the `count` rows of the slice, int64; None when the slice is the whole weight."""
        if self.start is None or self.stop is None:
            return None
        first = torch.arange(self.start, self.stop)
        if self.stride is None:
            return first
        groups = torch.arange(count // len(first))
        return (groups[:, None] * self.stride + first).flatten()


@dataclass(frozen=True)
class LortaBlock:
    """One CP tensor (`attention` or `mlp`), the group of heads of each matrix, and the slots it fills."""

    name: Literal["attention", "mlp"]
    factors: CPFactors
    group: tuple[int, ...]
    slots: tuple[Slot, ...]

    def shape(self, slot: Slot) -> tuple[int, int]:
        """`(out, in)` of a slot's part of the weight."""
        f = self.factors
        residual, heads = f.A.shape[0], f.C_h[self.group[slot.matrix]].shape[0] * f.B.shape[0]
        return (heads, residual) if slot.transposed else (residual, heads)

    def delta(self, slot: Slot) -> LowRankDelta:
        """`A diag(C_H[h] * C_L[l] * C_M[m]) B^T` for all heads side by side, `(d, H d_h)`, turned to the layout of the weight.

        Exact at the tensor's rank. LoRTA (arXiv 2410.04060), section 4.
        """
        slab = self.factors.slab(self.group, slot.layer, slot.matrix)
        return slab.T if slot.transposed else slab


@dataclass
class LortaAdapter:
    """A LoRTA to be written: its blocks (float32) and `exact` parameters by name; `dtype` is that of the factors on disk."""

    blocks: list[LortaBlock]
    dtype: torch.dtype
    exact: dict[str, Tensor | LazyTensor] = field(default_factory=dict)
    orientation: Orientation = "paper"
    base_model: str = ""
    task_type: str | None = None

    def tensors(self) -> dict[str, Tensor | LazyTensor]:
        tensors: dict[str, Tensor | LazyTensor] = {}
        for block in self.blocks:
            start, f = PREFIX + _NAMES[block.name], block.factors
            tensors |= {
                f"{start}A": f.A.to(self.dtype),
                f"{start}B": f.B.T.to(self.dtype),
                f"{start}C_l": f.C_l.to(self.dtype),
                f"{start}C_m": f.C_m.to(self.dtype),
                f"{start}C_h": f.C_h[0].to(self.dtype),
            }
            if len(f.C_h) > 1:
                tensors[f"{start}C_hkv"] = f.C_h[1].to(self.dtype)
        return tensors | {PREFIX + name: value for name, value in self.exact.items()}

    def config(self) -> dict[str, Any]:
        rank = self.blocks[0].factors.A.shape[1]
        return {
            "peft_type": LORTA,
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "use_rslora": False,
            "bias": "none",
            "orientation": self.orientation,
            "target_modules": sorted({slot.module.rsplit(".", 1)[-1] for b in self.blocks for slot in b.slots}),
            "blocks": {b.name: {"group": list(b.group), "slots": [_slot_row(s) for s in b.slots]} for b in self.blocks},
        }

    def write(self, directory: Path) -> int:
        """Write config and weights; returns the size of the weights in bytes."""
        (directory / CONFIG).write_text(json.dumps(self.config(), indent=1) + "\n", encoding="utf-8")
        return write_safetensors(directory / WEIGHTS, self.tensors(), {"format": "pt"})


def _slot_row(slot: Slot) -> list[Any]:
    row = [slot.module, slot.layer, slot.matrix, slot.transposed, slot.start, slot.stop]
    return row if slot.stride is None else [*row, slot.stride]


def read_lorta_blocks(
    location: Location, store: TensorStore, config: Mapping[str, Any], reference_slots: tuple[Slot, ...]
) -> list[LortaBlock]:
    """The CP tensors of a directory, float32, all scaling folded into `A`.

    `reference_slots` are the slots of the base's q, k, v and o, for a directory of the reference implementation, which
    does not name them. Raises `AdaptError` on missing tensors, contradicting shapes or slots outside the tensor.
    """
    described = config.get("blocks") or {"attention": {"group": [0, 0, 0, 0], "slots": None}}
    alpha = config.get("lora_alpha", 1)
    if not isinstance(described, dict) or not is_positive(alpha):
        raise AdaptError(f"{location.origin}: {CONFIG} has blocks that are no JSON object, or a lora_alpha of {alpha!r} that is no number")
    blocks = []
    for name, row in described.items():
        try:
            slots = reference_slots if row["slots"] is None else tuple(_slot(r) for r in row["slots"])
            block = LortaBlock(name, _read_factors(store, config, name), tuple(row["group"]), slots)
            _check_block(block)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise AdaptError(f"{location.origin}: is not a readable LoRTA adapter: {name}: {error}") from None
        blocks.append(block)
    return blocks


def _slot(row: Any) -> Slot:
    module, layer, matrix, transposed, start, stop, *stride = row
    rows = () if start is None and stop is None else (start, stop, *stride)
    counted = all(type(n) is int and n >= 0 for n in (layer, matrix, *rows))
    if not isinstance(module, str) or type(transposed) is not bool or not counted or (rows and start >= stop):
        raise ValueError(f"malformed slot {row!r}")
    if len(stride) > 1 or (stride and not (rows and stride[0] >= stop - start)):
        raise ValueError(f"malformed slot {row!r}")
    return Slot(module, layer, matrix, transposed, start, stop, *stride)


def _read_factors(store: TensorStore, config: Mapping[str, Any], name: str) -> CPFactors:
    start = _NAMES[name]
    keys = {key.removeprefix(PREFIX).removeprefix("base_model."): key for key in store.infos}

    def read(short: str) -> Tensor:
        if start + short not in keys:
            raise ValueError(f"{start}{short} is missing")
        if not store.infos[keys[start + short]].is_float:
            raise ValueError(f"{start}{short} is stored as {store.infos[keys[start + short]].dtype}, expected floating-point numbers")
        tensor = store.read(keys[start + short]).float()
        if tensor.ndim != 2:
            raise ValueError(f"{start}{short} has shape {list(tensor.shape)}, expected a matrix")
        return tensor

    rank = read("A").shape[1]
    if rank == 0:
        raise ValueError(f"{start}A has rank 0")
    scale = scaling(config, float(config.get("lora_alpha", rank)), rank)
    heads = [read("C_h")] + ([read("C_hkv")] if f"{start}C_hkv" in keys else [])
    return CPFactors(A=read("A") * scale, B=read("B").T, C_h=tuple(heads), C_l=read("C_l"), C_m=read("C_m"))


def _check_block(block: LortaBlock) -> None:
    f = block.factors
    rank = f.A.shape[1]
    for name, factor in (("B", f.B), ("C_l", f.C_l), ("C_m", f.C_m), *(("C_h", c) for c in f.C_h)):
        if factor.shape[1] != rank:
            raise ValueError(f"{name} has rank {factor.shape[1]}, A has {rank}")
    if len(block.group) != f.C_m.shape[0] or not all(0 <= g < len(f.C_h) for g in block.group):
        raise ValueError(f"group {list(block.group)} does not fit C_m {list(f.C_m.shape)}")
    for slot in block.slots:
        if slot.layer >= f.C_l.shape[0] or slot.matrix >= f.C_m.shape[0]:
            raise ValueError(f"{slot.module} is layer {slot.layer}, matrix {slot.matrix}, outside the tensor")
        rows, _ = block.shape(slot)
        if slot.start is None or slot.stop is None:
            continue
        each = slot.stop - slot.start  # of the whole slice, or of one head of several
        if each != rows and (slot.stride is None or rows % each):
            raise ValueError(f"{slot.module} has rows {slot.start} to {slot.stop}, but its slice of the tensor has {rows} rows")


def read_lorta(location: Location, reference_slots: tuple[Slot, ...]) -> Source:
    """Open a LoRTA directory of either orientation as factored deltas, one for each adapted module."""
    config = read_json(location.directory / CONFIG)
    store = TensorStore(weight_files(location))
    blocks = read_lorta_blocks(location, store, config, reference_slots)
    by_module: dict[str, list[tuple[LortaBlock, Slot]]] = {}
    for block in blocks:
        for slot in block.slots:
            by_module.setdefault(slot.module, []).append((block, slot))
    keys = tuple(key for key in store.infos if key.rsplit(".", 1)[-1].startswith("lora_"))
    parts = {f"{m}.weight": _module_part(m, pairs, keys) for m, pairs in by_module.items()}
    for key in store.infos:
        if key not in keys:
            name = key.removeprefix(PREFIX)
            parts[name] = whole_part(store, name, key)
    return Source("lorta", location, config, store, parts, {})


def _module_part(module: str, pairs: list[tuple[LortaBlock, Slot]], keys: tuple[str, ...]) -> Part:
    pairs = sorted(pairs, key=lambda pair: pair[1].start or 0)
    first, slot = pairs[0]
    shape = first.shape(slot)
    filled = [part.rows(block.shape(part)[0]) for block, part in pairs]
    if filled[0] is not None:
        shape = (max(int(rows.max()) + 1 if rows is not None else 0 for rows in filled), shape[1])

    def load() -> LowRankDelta:
        deltas = [block.delta(slot) for block, slot in pairs]
        if filled[0] is None:
            return deltas[0]
        # Parts of a fused matrix read the same residual, so they share A and are stacked in B.
        stacked = torch.zeros(shape[0], deltas[0].rank)
        for delta, rows in zip(deltas, filled, strict=True):
            stacked[rows] = delta.B
        return LowRankDelta(stacked, deltas[0].A)

    return Part(f"{module}.weight", keys, shape, "F32", "low_rank", load, first.factors.A.shape[1])
