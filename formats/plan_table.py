"""A forecast of `adapt-convert plan` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapt_convert.formats.sizes import size_text

if TYPE_CHECKING:
    from rich.table import Table


_MATERIAL = 0.001  # share of the change whose being noise is worth a line


def plan_tables(data: Mapping[str, Any]) -> list[Table]:
    """What changed by kind of tensor, and the candidates."""
    from rich.table import Table
    from rich.text import Text

    kinds = Table("changed", *_right("share", "effective rank", "rank 16 holds", "unchanged", "one step", "noise floor"))
    for kind, row in data["kinds"].items():
        noise = (row.get(key) for key in ("unchanged_entries", "one_step_entries", "noise_floor"))
        cells = [percent(row["share"]), effective_rank(row), percent(row.get("captured_by_rank_16")), *map(percent, noise)]
        kinds.add_row(*map(Text, (kind, *cells)))
    candidates = Table("options", *_right("size", "stored exactly", "captured"))
    for row in data["candidates"]:
        sizes = size_text(row["bytes"]), size_text(row["bytes_exact"])
        candidates.add_row(*map(Text, (row["options"], *sizes, percent(row["captured_of_matrices"]))))
    return [kinds, candidates, *_on_inputs(data["on_inputs"])]


def _on_inputs(found: Mapping[str, Any] | None) -> list[Table]:
    """What reaches the outputs of the matrices on a text; nothing without one."""
    from rich.table import Table
    from rich.text import Text

    if found is None:
        return []
    kinds = Table("reaches the outputs", *_right("share", "effective rank", "rank 16 holds"))
    for kind, row in found["kinds"].items():
        kinds.add_row(*map(Text, (kind, percent(row["share"]), effective_rank(row), percent(row["captured_by_rank_16"]))))
    ranks = Table("LoRA solved with --calib", *_right("holds of the outputs' change"))
    for rank, share in found["lora_by_rank"].items():
        ranks.add_row(f"--rank {rank}", percent(share))
    return [kinds, ranks]


def _right(*titles: str) -> list[Any]:
    from rich.table import Column

    return [Column(title, justify="right") for title in titles]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def effective_rank(row: Mapping[str, Any]) -> str:
    """One number where the bounds meet, else both."""
    low, high = row.get("effective_rank", (None, None))
    if low is None:
        return "-"
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"


def rounding_line(data: Mapping[str, Any]) -> str:
    """The change beside the rounding of its dtype, in a sentence; empty where that is next to nothing, or not known."""
    rounding = data["rounding"]
    floor = rounding.get("noise_floor", 0.0)
    if floor < _MATERIAL:
        return ""
    finer = ", so it is finer than that dtype resolves" if floor > 1 else ""
    return (
        f"The noise floor of the fine-tune's dtype is {floor:.1%} of the energy of the change of the matrices{finer}: "
        f"{rounding['unchanged_entries']:.1%} of their entries did not move, and {rounding['one_step_entries']:.1%}, with "
        f"{rounding['one_step_energy']:.1%} of the energy, moved by a single step."
    )


def series_of(row: Mapping[str, Any]) -> str:
    """The curve that a candidate belongs to: LoRAs by how their ranks are chosen, LatTEs by their number of segments."""
    words = row["options"].split()
    if row["target"] == "lora":
        return f"LoRA {words[2]}"
    return f"LatTE S={words[words.index('--segments') + 1]}" if row["target"] == "latte" else "LoRTA"
