"""The LoRTA target: one CP tensor over all layers, heads and matrices of the attention, and one of the MLP if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from adapt_convert.convert.architectures import Heads, family_of, heads_of, place_of
from adapt_convert.convert.delta import Delta, residual_energy
from adapt_convert.convert.family import ATTENTION_ROLES, FUSED, MLP_ROLES, WRITERS
from adapt_convert.convert.lora import lazy_value
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPFactors, CPShape, Slab
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record, exact
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.lorta import LortaAdapter, LortaBlock, Orientation, Slot

_ROUNDING = 0.01  # above this share of the tensor's energy lost, its few numbers are stored in float32


@dataclass(frozen=True)
class _Slice:
    """One logical matrix: `slot` says where it lies in its module and in the tensor, `heads` how many heads it has."""

    entry: Entry
    slot: Slot
    heads: int


def solve_lorta(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[LortaAdapter, list[Record]]:
    """Fit the CP tensors of the plan's matrices; the changed tensors of `stored` are kept by value.

    Factors get the dtype asked for, or the source's own unless rounding to it would cost a noticeable part of the tensor.
    """
    dtype = torch_dtype(output_dtype(options, pairs.source))
    adapter = LortaAdapter([], dtype, orientation=options.orientation)
    for name, slices, shape in _tensors(pairs.base, plan, options.orientation):
        adapter.blocks.append(_fit(pairs, name, slices, shape, options, progress))
    if not adapter.blocks:
        raise AdaptError(f"{pairs.source.origin}: none of the targeted matrices changed; there is nothing to factor")
    if options.dtype is None and any(_rounding(block, dtype) > _ROUNDING for block in adapter.blocks):
        adapter.dtype = torch.float32
    adapter.blocks = [replace(block, factors=as_written(block.factors, adapter.dtype)) for block in adapter.blocks]
    adapter.exact = {entry.name: lazy_value(pairs, plan, entry.name) for entry in stored}
    records = [exact(entry, energy, entry.reason) for entry, energy in stored.items()]
    return adapter, records + measure(pairs, plan, adapter, progress)


def empty_lorta(base: Checkpoint, plan: Plan, options: Options, rank: int, dtype: torch.dtype) -> LortaAdapter:
    """The adapter of a plan at a rank without numbers in it (on the `meta` device) and without exact parameters: for its size."""
    adapter = LortaAdapter([], dtype, orientation=options.orientation)
    for name, slices, shape in _tensors(base, plan, options.orientation):
        sizes = (shape.d, shape.d_h, shape.layers, len(shape.group), *shape.heads)
        A, B, C_l, C_m, *C_h = (torch.empty(size, rank, device="meta") for size in sizes)
        slots = tuple(s.slot for s in slices)
        adapter.blocks.append(LortaBlock(name, CPFactors(A, B, tuple(C_h), C_l, C_m), shape.group, slots))
    return adapter


def _tensors(base: Checkpoint, plan: Plan, orientation: Orientation) -> Iterator[tuple[Literal["attention", "mlp"], list[_Slice], CPShape]]:
    """The tensors of a plan, each with its slices and its shape."""
    kinds: tuple[tuple[Literal["attention", "mlp"], tuple[str, ...]], ...] = (("attention", ATTENTION_ROLES), ("mlp", MLP_ROLES))
    for name, roles in kinds:
        slices, d_h = _slices(base, plan, roles, orientation)
        if slices:
            yield name, slices, _shape(slices, d_h)


def _slices(base: Checkpoint, plan: Plan, roles: tuple[str, ...], orientation: Orientation) -> tuple[list[_Slice], int]:
    """The logical matrices of one tensor, in the order of layers and roles, and the length of its `B` mode."""
    entries = [e for e in plan.having("factor") if e.place and set(_parts(e.place.role)) & set(roles)]
    if not entries:
        return [], 0
    present = sorted({part for e in entries if e.place for part in _parts(e.place.role)}, key=roles.index)
    blocks = sorted({(e.place.block, e.place.layer) for e in entries if e.place})
    geometry = _geometry(base, entries, roles)
    slices = []
    for entry in entries:
        assert entry.place is not None
        layer = blocks.index((entry.place.block, entry.place.layer))
        parts = _parts(entry.place.role)
        groups = geometry.key_value if entry.place.role == "qkv_groups" else None  # one after the other, and each part within the first
        row, stride = 0, (geometry.query // groups + 2) * geometry.size if groups else None
        for part in parts:
            heads = geometry.key_value if part in ("k", "v") else geometry.query
            fused = len(parts) > 1
            stop = row + heads // (groups or 1) * geometry.size
            writes = part in WRITERS or orientation == "reference"
            slot = Slot(entry.module, layer, present.index(part), not writes, *((row, stop, stride) if fused else (None, None)))
            slices.append(_Slice(entry, slot, heads))
            _check_slice(entry, slot, heads * geometry.size, fused, orientation, base)
            row = stop
    return slices, geometry.size


def _parts(role: str) -> tuple[str, ...]:
    return FUSED.get(role, (role,))


def _geometry(base: Checkpoint, entries: list[Entry], roles: tuple[str, ...]) -> Heads:
    """Heads of the attention, or the MLP's hidden width as one wide head."""
    if roles == MLP_ROLES:
        first = entries[0]
        assert first.place is not None
        if first.place.role in WRITERS:
            return Heads(1, 1, first.matrix_shape[1])
        return Heads(1, 1, first.matrix_shape[0] // len(_parts(first.place.role)))
    heads = heads_of(base.config)
    if heads is None:
        raise AdaptError(f"{base.origin}: config.json does not say how many attention heads there are; LoRTA needs them")
    return heads


def _check_slice(entry: Entry, slot: Slot, width: int, fused: bool, orientation: Orientation, base: Checkpoint) -> None:
    rows, columns = entry.matrix_shape
    if orientation == "reference" and (fused or rows != columns):
        raise AdaptError(
            f"{entry.name} is {[rows, columns]}: the reference orientation holds separate square q, k, v and o only; "
            "use --orientation paper"
        )
    found = rows if slot.transposed else columns
    if found != width and not fused:
        raise AdaptError(f"{entry.name} has {found} channels, but the heads in {base.origin}'s config.json make {width}")


def _shape(slices: list[_Slice], d_h: int) -> CPShape:
    counts = list(dict.fromkeys(s.heads for s in sorted(slices, key=lambda s: s.slot.matrix)))
    group = {s.slot.matrix: counts.index(s.heads) for s in slices}
    return CPShape(
        d=_residual_width(slices),
        d_h=d_h,
        layers=max(s.slot.layer for s in slices) + 1,
        heads=tuple(counts),
        group=tuple(group[m] for m in sorted(group)),
    )


def _fit(
    pairs: Pairs, name: Literal["attention", "mlp"], slices: list[_Slice], shape: CPShape, options: Options, progress: Progress
) -> LortaBlock:
    slabs = [Slab(s.slot.layer, s.slot.matrix, _loader(pairs, s, shape.d_h)) for s in slices]
    assert options.rank is not None
    fit = fit_cp(slabs, shape, options.rank, seed=options.seed, device=pairs.device, progress=progress)
    factors = as_written(fit.factors, torch.float32)  # on the CPU, where what is written is compared with them
    return LortaBlock(name, factors, shape.group, tuple(s.slot for s in slices))


def _residual_width(slices: list[_Slice]) -> int:
    widths = {s.entry.matrix_shape[1 if s.slot.transposed else 0] for s in slices}
    if len(widths) > 1:
        raise AdaptError(f"the layers read residual streams of different widths, {sorted(widths)}; one LoRTA holds one width")
    return widths.pop()


def _loader(pairs: Pairs, part: _Slice, d_h: int) -> Callable[[], Delta]:
    count = part.heads * d_h
    return lambda: slab_of(pairs.passing_delta(part.entry), part.slot, count)


def slab_of(delta: Delta, slot: Slot, count: int) -> Delta:
    """A slot's part of a module's change as the tensor has it, `(d, heads * d_h)`; `count` is `heads * d_h`."""
    rows = _part_of(delta, slot, count)
    return rows.T if slot.transposed else rows


def _part_of(delta: Delta, slot: Slot, count: int) -> Delta:
    """The `count` rows of a module's change that a slot speaks of."""
    if slot.start is None or slot.stop is None:
        return delta
    if slot.stride is None:
        return delta.rows(slot.start, slot.stop)
    rows = slot.rows(count)
    assert rows is not None
    return delta.pick(rows)


def _rounding(block: LortaBlock, dtype: torch.dtype) -> float:
    """Share of a tensor's energy that rounding its factors loses: more than the dtype's, squared, where columns cancel each other."""
    factors, rounded = block.factors, as_written(block.factors, dtype)
    energy = factors.inner(factors, block.group)
    lost = energy - 2 * factors.inner(rounded, block.group) + rounded.inner(rounded, block.group)
    return lost / energy if energy else 0.0


def as_written(factors: CPFactors, dtype: torch.dtype) -> CPFactors:
    """The factors as they will be read back: rounded to the output dtype, in float32 on the CPU."""
    return CPFactors.of({name: factor.to("cpu", dtype).float() for name, factor in factors.named().items()})


def measure(pairs: Pairs, plan: Plan, adapter: LortaAdapter, progress: Progress) -> list[Record]:
    """A last pass over the matrices: what each slice of the written tensor misses of its matrix."""
    slots: dict[str, list[tuple[LortaBlock, Slot]]] = {}
    for block in adapter.blocks:
        for slot in block.slots:
            slots.setdefault(slot.module, []).append((block, slot))

    def missed(entry: Entry, delta: Delta) -> tuple[float, float]:
        residual = 0.0
        for block, slot in slots[entry.module]:
            rows = _part_of(delta, slot, block.shape(slot)[0])
            residual += residual_energy(rows, block.delta(slot).to(pairs.device))
        return delta.energy(), residual

    records = []
    for entry, (energy, residual) in pairs.each(progress(plan.having("factor"), "measuring"), missed):
        rank = slots[entry.module][0][0].factors.A.shape[1]
        reason = "" if energy else "did not change itself, but is a slice of the common tensor"
        records.append(Record(entry, "factored", energy, residual, reason, rank))
    return records


def reference_slots(modules: Iterable[str], config: Mapping[str, Any]) -> tuple[Slot, ...]:
    """q, k, v and o among a model's modules, by layer, for a directory of the reference implementation, which names none."""
    family = family_of(config)
    slots = []
    for module in modules:
        place = place_of(module, family) if family else None
        if place and place.block == 0 and place.role in ATTENTION_ROLES:
            slots.append(Slot(module, place.layer, ATTENTION_ROLES.index(place.role), transposed=False))
    return tuple(sorted(slots, key=lambda slot: (slot.layer, slot.matrix)))
