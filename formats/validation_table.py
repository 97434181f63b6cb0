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
    data = labelled(data)
    rows = [data["base"], *data["candidates"]]
    fine_tune = {"kl": None, "recovered": None, "top1": None, "passed": None, "details": {}, **data["fine_tune"], "kind": "fine-tune"}
    return [_table([rows[0], fine_tune, *rows[1:]], _FIDELITY), _table(rows, _COST)]


def _table(rows: Sequence[Mapping[str, Any]], shown: Sequence[tuple[str, Any]]) -> Table:
    """One line a row; a column that nothing fills is left out."""
    from rich.table import Table
    from rich.text import Text

    columns = [(title, [show(row) for row in rows]) for title, show in shown]
    columns = [(title, cells) for title, cells in columns if any(cell != "-" for cell in cells)]
    table = Table()
    for title, _ in columns:
        table.add_column(title, justify="left" if title in ("model", "kind", "verdict") else "right", overflow="fold")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, cells))  # a name may hold what rich takes for markup
    return table


def enlarged_line(data: Mapping[str, Any]) -> str | None:
    """A sentence on what was done about tokens that the base lacks; None where there are none."""
    if not data["enlarged"]:
        return None
    old, new = data["enlarged"]
    return f"The base has {old} tokens and ran enlarged to the fine-tune's {new}, bare and under every adapter; the KL is over all {new}."


def untimed_line(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence on the failed among the labelled models, of which the base is the first, that were not timed with it; None where there
    are none."""
    silent = [label(row) for row in rows if row["passed"] is False and not row["speed"]] if rows[0]["speed"] else []
    return f"Not timed, as another model's speed says nothing: {', '.join(silent)}." if silent else None


def verdict(row: Mapping[str, Any]) -> str:
    return {None: "-", True: "pass", False: "FAIL"}[row["passed"]]


def labelled(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `validation.json` with a `label` in each model: the shortest end of its path that no other path has, with the
    task of a bundle."""
    models = [data["base"], data["fine_tune"], *data["candidates"]]
    paths = {str(row["path"]): str(row["path"]).rstrip("/").split("/") for row in models}

    def shortest(path: str) -> str:
        others = [parts for other, parts in paths.items() if other != path]
        ends = ("/".join(paths[path][-n:]) for n in range(1, len(paths[path])) if all(paths[path][-n:] != o[-n:] for o in others))
        return next(ends, path)

    def named(row: Mapping[str, Any]) -> dict[str, Any]:
        task = row.get("details", {}).get("task")
        return {**row, "label": shortest(str(row["path"])) + (f" [{task}]" if task else "")}

    candidates = [named(row) for row in data["candidates"]]
    return {**data, "base": named(data["base"]), "fine_tune": named(data["fine_tune"]), "candidates": candidates}


def label(row: Mapping[str, Any]) -> str:
    return str(row["label"])


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def share_text(share: float | None, digits: int = 1) -> str:
    """A share in per cent; below -1000 % only that it is."""
    if share is None:
        return "-"
    return "below -1000%" if share < -10 else f"{share:.{digits}%}"


def _share(*keys: str) -> Any:
    find = _value(*keys)
    return lambda row: share_text(find(row))


def _number(form: str, *keys: str) -> Any:
    find = _value(*keys)

    def show(row: Mapping[str, Any]) -> str:
        value = find(row)
        return "-" if value is None else format(value, form)

    return show


def _value(*keys: str) -> Any:
    def find(row: Mapping[str, Any]) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if value is not None else None
        return value

    return find


_SPEED = ("speed", "prefill_tokens_per_second", "median")
_FIDELITY: tuple[tuple[str, Any], ...] = (
    ("model", label),
    ("kind", lambda row: row["kind"]),
    ("KL", _number(".4g", "kl")),
    ("error", _number(".4g", "details", "error")),
    ("recovered", _share("recovered")),
    ("top-1", _share("top1")),
    ("perplexity", _number(".3f", "perplexity")),
    ("verdict", verdict),
)
_COST: tuple[tuple[str, Any], ...] = (
    ("model", label),
    ("captured energy", _share("details", "captured_energy")),
    ("size", lambda row: size_text(row["bytes"])),
    ("prefill/s", _number(".0f", *_SPEED)),
    ("s/token", _number(".4f", "speed", "seconds_per_output_token", "median")),
    ("time x base", _number(".2f", "speed", "slowdown")),
    ("load s", _number(".2f", "speed", "load_seconds")),
)
