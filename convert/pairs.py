"""Reading the two sides of a conversion together, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta
from adapt_convert.convert.pieces import Piece, Pieces
from adapt_convert.convert.preflight import Entry
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import Source

_CHUNK = 2**22  # elements compared at a time: 16 MB of float32


class Pairs:
    """The base and the source of a conversion. Raises `AdaptError` naming the tensor when a change is not finite.

    With `pieces`, what was worked out for a tensor is kept there, and taken from there where an earlier run has left it.
    """

    def __init__(self, base: Checkpoint, source: Source, device: torch.device, pieces: Pieces | None = None) -> None:
        self.base = base
        self.source = source
        self.device = device
        self.pieces = pieces
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

    def deltas(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Delta]]:
        """Each matrix's change in `(out, in)` layout; the next pair is read from the disk while this one is in use."""
        entries = list(entries)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(self._read, entries[0]) if entries else None
            for position, entry in enumerate(entries):
                assert ahead is not None
                new, old = ahead.result()
                if position + 1 < len(entries):
                    ahead = pool.submit(self._read, entries[position + 1])
                yield entry, self._subtract(entry, new, old)

    def delta(self, entry: Entry) -> Delta:
        """One matrix's change, `(out, in)` float32, on the device of the conversion."""
        return self._subtract(entry, *self._read(entry))

    def _read(self, entry: Entry) -> tuple[Tensor | LowRankDelta, Tensor | None]:
        new = entry.part.load()
        old = self.base.read(entry.base_key) if entry.base_key and not isinstance(new, LowRankDelta) else None
        return new, old

    def _subtract(self, entry: Entry, new: Tensor | LowRankDelta, old: Tensor | None) -> Delta:
        if isinstance(new, LowRankDelta):
            delta: Delta = new.to(self.device)
        else:
            assert old is not None
            rows = min(len(new), len(old))
            # float32 first: subtracting in bfloat16 would round away most of a light fine-tune.
            difference = new[:rows].to(self.device, torch.float32, copy=True).sub_(old[:rows].to(self.device))
            if rows < len(old):  # rows that the source cut stay as they are
                difference = torch.cat([difference, difference.new_zeros(len(old) - rows, difference.shape[1])])
            delta = DenseDelta(difference.T.contiguous() if entry.transposed else difference)
        self._check_finite(entry, delta.energy())
        return delta

    def change_energy(self, entry: Entry) -> tuple[float, float]:
        """`||new - base||_F^2` of any tensor, in chunks: of the rows that both sides have, and of rows only the source has.

        A tensor that the base lacks counts whole among the first. Of integers the number of differing entries is returned.
        """
        figures = self.kept("compared", entry, lambda: Piece({}, dict(zip(("energy", "lost"), self._compare(entry), strict=True)))).figures
        return figures["energy"], figures["lost"]

    def _compare(self, entry: Entry) -> tuple[float, float]:
        new, old = self._read(entry)
        lost = 0.0
        if isinstance(new, LowRankDelta):
            energy = new.energy()
        elif old is None or entry.part.kind == "add":
            energy = _energy(new, None)
        else:
            rows = min(len(new), len(old)) if new.ndim else None
            energy = _energy(new[:rows], old[:rows]) if rows is not None else _energy(new, old)
            lost = _energy(new[rows:], None) if rows is not None else 0.0
        self._check_finite(entry, energy + lost)
        return energy, lost

    def _check_finite(self, entry: Entry, energy: float) -> None:
        if not torch.isfinite(torch.tensor(energy)):
            raise AdaptError(f"{entry.name}: the change from base to {self.source.origin} is not finite (NaN or Inf)")

    def value(self, entry: Entry) -> Tensor:
        """The parameter's new value, in the base's shape where the base has it, in its own dtype when it is stored whole."""
        if entry.part.kind == "replace" and entry.part.shape == self._base_shape(entry):
            new = entry.part.load()
            assert isinstance(new, Tensor)
            return new  # nothing of the base is in it
        new, old = self._read(entry)
        if isinstance(new, LowRankDelta):
            assert entry.base_key is not None
            base = self.base.read(entry.base_key).float()
            return base + (new.dense().T if entry.transposed else new.dense())
        if entry.part.kind == "add":
            assert old is not None
            return old.float() + new
        if old is None:
            return new
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

    def _base_shape(self, entry: Entry) -> tuple[int, ...] | None:
        return self.base.infos[entry.base_key].shape if entry.base_key else None


def _energy(new: Tensor, old: Tensor | None) -> float:
    new = new.reshape(-1)
    old = old.reshape(-1) if old is not None else None
    if not new.is_floating_point():
        return float((new != old).sum() if old is not None else new.numel())
    total = 0.0
    for start in range(0, new.numel(), _CHUNK):
        block = new[start : start + _CHUNK].to(torch.float32, copy=True)
        if old is not None:
            block.sub_(old[start : start + _CHUNK])
        total += float(torch.linalg.vector_norm(block).double() ** 2)
    return total
