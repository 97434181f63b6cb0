"""Reading the two sides of a conversion together: differences, block by block, of a few tensors at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, moved, squared_norm
from adapt_convert.convert.pieces import Piece, Pieces
from adapt_convert.convert.preflight import Entry
from adapt_convert.convert.side_by_side import DELTA_BYTES, side_by_side
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import Source

Result = TypeVar("Result")
Gain = tuple[Tensor, Tensor | None]

_BLOCK = 2**19  # elements read and subtracted at a time: with its float32 difference, 4 MB that stay in the processor's cache
_COPIED = 2**22  # elements copied to a GPU at a time: with fewer, threads wait for Python's lock
_ROW = 2**12  # elements whose squares are summed in float32: of a whole block, the sum could be off by a thousandth
_KEPT = 2**27  # elements of the largest buffer that a thread keeps


class _Scratch(threading.local):
    """One buffer per thread and dtype, on a CPU: fresh memory costs more time, page by page, than the difference that goes there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, Tensor] = {}

    def fresh(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self._device)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        if count > _KEPT or self._device.type != "cpu":
            return self.fresh(count, dtype)
        if dtype not in self._buffers or len(self._buffers[dtype]) < count:
            self._buffers[dtype] = torch.empty(count, dtype=dtype)
        return self._buffers[dtype][:count]


class Pairs:
    """The base and the source of a conversion. Raises `AdaptError` naming the tensor when a change is not finite.

    With `pieces`, what was worked out for a tensor is kept there, and taken from there where an earlier run has left it.
    """

    def __init__(self, base: Checkpoint, source: Source, device: torch.device, pieces: Pieces | None = None) -> None:
        self.base = base
        self.source = source
        self.device = device
        self.pieces = pieces
        self._scratch = _Scratch(device)
        if pieces is not None:
            base.store.learn(pieces.base_digests)

    def kept(self, what: str, entry: Entry, make: Callable[[], Piece]) -> Piece:
        """The piece of an entry: one that an earlier run has left, else `make()`, kept for a later run."""
        if self.pieces is None:
            return make()
        piece = self.pieces.load(f"{what} {entry.name}")
        if piece is not None:
            self.base.store.learn(piece.digests["base"])
            self.source.store.learn(piece.digests["source"])
            return piece
        made = make()
        keys = {"base": [entry.base_key] if entry.base_key else [], "source": entry.part.keys}
        digests = {"base": self.base.store.known(keys["base"]), "source": self.source.store.known(keys["source"])}
        self.pieces.save(f"{what} {entry.name}", replace(made, digests=digests))
        return made

    def each(self, entries: Iterable[Entry], work: Callable[[Entry, Delta], Result]) -> Iterator[tuple[Entry, Result]]:
        """`work(entry, change)` of every matrix, in order but several at a time; the change is gone when `work` returns."""
        return side_by_side(entries, _delta_bytes, self.passing_delta, work, self.device)

    def delta(self, entry: Entry) -> Delta:
        """One matrix's change, `(out, in)` float32, on the device of the conversion."""
        return self._delta(entry, self._scratch.fresh)

    def passing_delta(self, entry: Entry) -> Delta:
        """The same, in memory that the next call from the same thread overwrites."""
        return self._delta(entry, self._scratch.take)

    def passing_effective_delta(self, entry: Entry, new: Tensor, change: Tensor | None) -> Delta:
        """`D diag(new) + W_base diag(change)` of a matrix of a checkpoint, stored as `(out, in)`, in memory as that of `passing_delta`.

        `new` and `change` are `(in,)` float32, on the device of the conversion; without `change` only the first term.
        """
        return self._delta(entry, self._scratch.take, (new, change))

    def _delta(self, entry: Entry, allocate: Callable[[int, torch.dtype], Tensor], gain: Gain | None = None) -> Delta:
        if entry.part.kind == "low_rank":
            delta: Delta = self._low_rank(entry).to(self.device)
        else:
            assert entry.base_key
            shape = self.base.infos[entry.base_key].shape
            difference = allocate(math.prod(shape), torch.float32)
            self._subtract(entry, difference, gain)
            stored = difference.view(shape[0], -1)  # of a convolution: (out, in * kh * kw)
            spare = allocate(math.prod(shape), torch.bfloat16) if stored.device.type == "cpu" else None
            delta = DenseDelta(stored.T.contiguous() if entry.transposed else stored, spare)
        self._check_finite(entry, delta.energy())
        return delta

    def _low_rank(self, entry: Entry) -> LowRankDelta:
        value = entry.part.load()
        assert isinstance(value, LowRankDelta)
        return value

    def _subtract(self, entry: Entry, difference: Tensor, gain: Gain | None) -> None:
        """Fill `difference`, 1-D float32 of the base's size: float32 first, as bfloat16 would round away most of a light fine-tune."""
        if entry.part.kind == "add":
            value = entry.part.load()
            assert isinstance(value, Tensor)
            difference.copy_(value.reshape(-1))
            return
        position = 0
        elements = _BLOCK if self.device.type == "cpu" else _COPIED
        if gain:
            elements = max(elements // len(gain[0]), 1) * len(gain[0])  # whole rows
        for new, old in zip_longest(self._new_blocks(entry, elements), self._old_blocks(entry, elements)):
            if new is not None and old is not None:
                count = min(len(new), len(old))
                block = difference[position : position + count]
                before = moved(old[:count], self.device)
                block.copy_(moved(new[:count], self.device)).sub_(before)
                if gain:
                    _fold(block.view(-1, len(gain[0])), before, *gain)
                position += count
        difference[position:].zero_()  # rows that the source cut stay as they are

    def _new_blocks(self, entry: Entry, elements: int) -> Iterator[Tensor]:
        if entry.part.blocks:
            return entry.part.blocks(elements)
        value = entry.part.load()
        assert isinstance(value, Tensor)
        return iter(torch.split(value.reshape(-1), elements))

    def _old_blocks(self, entry: Entry, elements: int) -> Iterator[Tensor]:
        return self.base.blocks(entry.base_key, elements) if entry.base_key else iter(())

    def _read(self, entry: Entry) -> tuple[Tensor | LowRankDelta, Tensor | None]:
        new = entry.part.load()
        old = self.base.read(entry.base_key) if entry.base_key and not isinstance(new, LowRankDelta) else None
        return new, old

    def change_energies(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, tuple[float, float]]]:
        """`change_energy` of every tensor, in order but several at a time."""
        cpu = torch.device("cpu")  # whatever the conversion's: nothing is asked of a device
        return side_by_side(entries, lambda entry: 0, self.change_energy, lambda entry, energies: energies, cpu)

    def change_energy(self, entry: Entry) -> tuple[float, float]:
        """`||new - base||_F^2` of any tensor, in blocks: of the rows that both sides have, and of rows only the source has.

        A tensor that the base lacks counts whole among the first. Of integers the number of differing entries is returned.
        """
        figures = self.kept("compared", entry, lambda: Piece({}, dict(zip(("energy", "lost"), self._compare(entry), strict=True)))).figures
        return figures["energy"], figures["lost"]

    def _compare(self, entry: Entry) -> tuple[float, float]:
        energy = lost = 0.0
        if entry.part.kind == "low_rank":
            energy = self._low_rank(entry).energy()
        elif entry.base_key is None or entry.part.kind == "add":
            energy = sum(_energy(block) for block in self._new_blocks(entry, _BLOCK))
        else:
            for new, old in zip_longest(self._new_blocks(entry, _BLOCK), self._old_blocks(entry, _BLOCK)):
                if new is not None:
                    count = len(old) if old is not None else 0
                    energy += _energy(new[:count], old[: len(new)] if old is not None else None)
                    lost += _energy(new[count:])
        self._check_finite(entry, energy + lost)
        return energy, lost

    def _check_finite(self, entry: Entry, energy: float) -> None:
        if not torch.isfinite(torch.tensor(energy)):
            raise AdaptError(f"{entry.name}: the change from base to {self.source.origin} is not finite (NaN or Inf)")

    def value(self, entry: Entry) -> Tensor:
        """The parameter's new value, in the base's shape unless rows were added, in its own dtype when it is stored whole."""
        old_shape = self.base.infos[entry.base_key].shape if entry.base_key else None
        if entry.part.kind == "replace" and (entry.rows_added or old_shape in (None, entry.part.shape)):
            whole = entry.part.load()
            assert isinstance(whole, Tensor)
            return whole
        new, old = self._read(entry)
        if isinstance(new, LowRankDelta):
            assert entry.base_key is not None
            base = self.base.read(entry.base_key).float()
            return base + (new.dense().T if entry.transposed else new.dense().view(base.shape))
        assert old is not None
        if entry.part.kind == "add":
            return old.float() + new
        merged = old.to(new.dtype, copy=True)
        rows = min(len(new), len(old))
        merged[:rows] = new[:rows]
        return merged

    def difference(self, entry: Entry) -> Tensor:
        """New value less the base's, float32, in the stored layout (for vectors)."""
        return self.kept("difference", entry, lambda: Piece({"difference": self._difference(entry)}, {})).tensors["difference"]

    def _difference(self, entry: Entry) -> Tensor:
        new, old = self._read(entry)
        assert isinstance(new, Tensor)
        return new.float() if entry.part.kind == "add" or old is None else new.float() - old.float()


def _fold(rows: Tensor, before: Tensor, new: Tensor, change: Tensor | None) -> None:
    """Rows of a difference, in place, as `passing_effective_delta` has them; `before` are the base's, 1-D."""
    rows.mul_(new)
    if change is not None:
        rows.addcmul_(before.view(rows.shape).float(), change)


def _delta_bytes(entry: Entry) -> int:
    return DELTA_BYTES * math.prod(entry.part.shape)


def _energy(new: Tensor, old: Tensor | None = None) -> float:
    """Of one block: the squared norm of the difference, or how many integers differ."""
    if not new.is_floating_point():
        return float((new != old).sum() if old is not None else new.numel())
    difference = new.to(torch.float32, copy=True)
    if old is not None:
        difference.sub_(old)
    whole = len(difference) // _ROW * _ROW
    parts = difference[:whole].view(-1, _ROW), difference[whole:].view(1, -1)
    return sum(float(squared_norm(rows)) for rows in parts)
