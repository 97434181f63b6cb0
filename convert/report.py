"""The record of a conversion: what became of every tensor, measured on what was written."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

from adapt_convert.convert.architectures import is_embedding, is_head
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.source import WITHOUT_MAGNITUDE, Source

Status = Literal["factored", "exact", "unchanged", "dropped"]


@dataclass(frozen=True)
class Record:
    """What became of one tensor. `energy` is `||change||_F^2`; `residual` what of it the written adapter misses."""

    entry: Entry
    status: Status
    energy: float
    residual: float
    reason: str = ""
    rank: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)  # what else was measured of it

    @property
    def captured(self) -> float | None:
        """Captured energy, `1 - residual / energy`; None where nothing changed."""
        return 1.0 - self.residual / self.energy if self.energy > 0 else None

    @property
    def is_loss(self) -> bool:
        return self.status == "dropped" and self.entry.lossy

    def to_json(self, source: Source, noise: float | None) -> dict[str, Any]:
        """`noise` is the expected energy of what quantising the base put under the change."""
        row: dict[str, Any] = {"status": self.status, "shape": list(self.entry.part.shape), "energy": self.energy}
        if self.status == "factored":
            row |= {"rank": self.rank, "captured_energy": self.captured}
        row |= {"base_noise": noise} if noise is not None else {}
        row |= self.figures
        row |= {"reason": self.reason} if self.reason else {}
        return row | {"source_tensors": source.store.stored_names(self.entry.part.keys)}


def captured_energy(records: Iterable[Record]) -> float | None:
    """The share of the records' total energy that the adapter holds; None when nothing changed."""
    records = list(records)
    total = sum(record.energy for record in records)
    return 1.0 - sum(record.residual for record in records) / total if total > 0 else None


def _without_magnitude(factored: Iterable[Record]) -> dict[str, float]:
    """Of a DoRA: the share of the change that its own factors hold, had one left the magnitudes away."""
    shares = [(record.energy, record.figures[WITHOUT_MAGNITUDE]) for record in factored if WITHOUT_MAGNITUDE in record.figures]
    total = sum(energy for energy, _ in shares)
    return {WITHOUT_MAGNITUDE: sum(energy * share for energy, share in shares) / total} if total else {}


def unchanged(entry: Entry) -> Record:
    return Record(entry, "unchanged", 0.0, 0.0)


def exact(entry: Entry, energy: float, reason: str = "") -> Record:
    return Record(entry, "exact", energy, 0.0, reason)


def dropped(entry: Entry, energy: float, reason: str) -> Record:
    return Record(entry, "dropped", energy, energy, reason)


def build_report(base: Checkpoint, source: Source, options: Options, records: Iterable[Record], missing: Iterable[str]) -> dict[str, Any]:
    """The content of `conversion.json` but for what is known only after writing (`bytes`, `seconds`, `peak_memory`)."""
    records = list(records)
    factored = [record for record in records if record.status == "factored"]
    return {
        "target": options.to,
        "captured_energy": captured_energy(factored),
        **_without_magnitude(factored),
        "captured_energy_of_all_changes": captured_energy(records),
        "options": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(options).items()},
        "seed": options.seed,
        "device": str(options.torch_device()),
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("adapt-convert", "torch", "safetensors", "transformers")
                if find_spec(name.replace("-", "_"))
            },
        },
        "inputs": {
            role: {
                "origin": side.origin,
                "kind": side.kind,
                "revision": side.location.revision,
                "bytes": side.store.nbytes,
                "blake3": side.store.content_hash(),
            }
            for role, side in (("base", base), ("source", source))
        },
        **_sizes_to_load(records),
        **({"quantised_base": _quantised_base(base, factored)} if base.quantisation else {}),
        "missing_from_source": list(missing),
        "ignored_source_tensors": dict(source.ignored),
        "tensors": {record.entry.name: record.to_json(source, base.store.noise.get(record.entry.base_key or "")) for record in records},
    }


def _quantised_base(base: Checkpoint, factored: Iterable[Record]) -> dict[str, Any]:
    """The format of a quantised base, and its rounding noise as a share of what the factored matrices seem to have changed by."""
    factored = list(factored)
    noise = sum(base.store.noise.get(record.entry.base_key or "", 0.0) for record in factored)
    total = sum(record.energy for record in factored)
    return {"format": base.quantisation, "noise": noise / total if total else None}


def _sizes_to_load(records: Iterable[Record]) -> dict[str, int]:
    """What the base has to be given before it takes the adapter: a `vocabulary` or a number of `classes` larger than its own."""
    kept = [record.entry for record in records if record.entry.rows_added and record.status == "exact"]
    tokens = [entry.part.shape[0] for entry in kept if is_embedding(entry.module) or entry.module.startswith("lm_head")]
    classes = [entry.part.shape[0] for entry in kept if is_head(entry.module) and not entry.module.startswith("lm_head")]
    if tokens:
        return {"vocabulary": max(tokens)}
    return {"classes": max(classes)} if classes else {}
