"""A validation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapt_convert.formats.sizes import size_text

if TYPE_CHECKING:
    from rich.table import Table


def validation_tables(data: Mapping[str, Any]) -> list[Table]:
    """Fidelity of the base and each candidate, with the fine-tune's own perplexity, and their cost, from `validation.json`'s content.

    Two tables, as 80 columns hold no more.
    """
    rows = [data["base"], *data["candidates"]]
    fine_tune = {"kl": None, "recovered": None, "top1": None, "passed": None, "details": {}, **data["fine_tune"], "kind": "fine-tune"}
    return [_table([rows[0], fine_tune, *rows[1:]], _FIDELITY), _table(rows, _COST)]


def _table(rows: Sequence[Mapping[str, Any]], shown: Sequence[tuple[str, Any]]) -> Table:
    """One line a row; a column that nothing fills is left out."""
    from rich.table import Table

    columns = [(title, [show(row) for row in rows]) for title, show in shown]
    columns = [(title, cells) for title, cells in columns if any(cell != "-" for cell in cells)]
    table = Table()
    for title, _ in columns:
        table.add_column(title, justify="left" if title in ("model", "kind", "verdict") else "right", overflow="fold")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    return table


def verdict(row: Mapping[str, Any]) -> str:
    return {None: "-", True: "pass", False: "FAIL"}[row["passed"]]


def label(row: Mapping[str, Any]) -> str:
    """The end of a path that tells candidates apart, with the task of a bundle."""
    task = row["details"].get("task")
    return str(row["path"]).rstrip("/").rsplit("/", 1)[-1] + (f" [{task}]" if task else "")


def _number(form: str, *keys: str) -> Any:
    def show(row: Mapping[str, Any]) -> str:
        value: Any = row
        for key in keys:
            value = value.get(key) if value is not None else None
        return "-" if value is None else format(value, form)

    return show


_SPEED = ("speed", "prefill_tokens_per_second", "median")
_FIDELITY: tuple[tuple[str, Any], ...] = (
    ("model", label),
    ("kind", lambda row: row["kind"]),
    ("KL", _number(".4g", "kl")),
    ("error", _number(".4g", "details", "error")),
    ("recovered", _number(".1%", "recovered")),
    ("top-1", _number(".1%", "top1")),
    ("perplexity", _number(".3f", "perplexity")),
    ("verdict", verdict),
)
_COST: tuple[tuple[str, Any], ...] = (
    ("model", label),
    ("captured energy", _number(".1%", "details", "captured_energy")),
    ("size", lambda row: size_text(row["bytes"])),
    ("prefill/s", _number(".0f", *_SPEED)),
    ("s/token", _number(".4f", "speed", "seconds_per_output_token", "median")),
    ("time x base", _number(".2f", "speed", "slowdown")),
    ("load s", _number(".2f", "speed", "load_seconds")),
)
