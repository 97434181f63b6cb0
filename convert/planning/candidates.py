"""An adapter that could be written: what it would capture and how many bytes it would take, with the options that make it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapt_convert.convert.options import Options
from adapt_convert.convert.report import Record, captured_energy
from adapt_convert.formats.latte import LatteAdapter
from adapt_convert.formats.lorta import LortaAdapter
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.safetensors_file import safetensors_size


@dataclass(frozen=True)
class Candidate:
    """One point of the frontier. `options` are those of `delta` that write it.

    `captured_energy`, `captured_energy_of_all_changes`, `bytes` and `bytes_exact` are what its `conversion.json` would say.
    `captured_of_matrices` is the same for every target, so that they compare: the share of the change of all matrices, those that
    this target leaves out included, and tensors that are stored exactly or were excluded left aside.
    """

    target: str
    options: str
    bytes: int
    bytes_exact: int
    captured_energy: float
    captured_energy_of_all_changes: float
    captured_of_matrices: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def candidate(
    size: str, options: Options, adapter: LoraAdapter | LortaAdapter | LatteAdapter, solved: list[Record], rest: Sequence[Record]
) -> Candidate:
    """The candidate of an adapter, whose factors may be empty (on the `meta` device) as only their shapes are looked at.

    `size` are the options that say how large it is, as typed; `options` has the others, and `rest` are the records of what is not factored.
    """
    everything = [*rest, *solved]
    return Candidate(
        options.to,
        " ".join([f"--to {options.to}", size, *_typed(options)]),
        safetensors_size(adapter.tensors(), {"format": "pt"}),
        sum(tensor.nbytes for tensor in adapter.exact.values()),
        captured_energy(record for record in solved if record.status == "factored") or 0.0,
        captured_energy(everything) or 0.0,
        captured_energy(record for record in everything if _is_matrix(record)) or 0.0,
    )


def _typed(options: Options) -> list[str]:
    """The options that every candidate shares, as `delta` takes them."""
    named = {"--target-modules": ",".join(options.target_modules), "--exclude": ",".join(options.exclude), "--dtype": options.dtype}
    return [f"{name} {shlex.quote(value)}" for name, value in named.items() if value]


def _is_matrix(record: Record) -> bool:
    """A matrix that was not excluded, which alone is left out without being a loss."""
    return record.entry.kind == "matrix" and record.status != "exact" and (record.status != "dropped" or record.entry.lossy)
