"""A forecast of `adapt-convert plan` as one self-contained page: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from adapt_convert.formats.plan_table import effective_rank, percent, rounding_line, series_of
from adapt_convert.formats.sizes import size_text
from adapt_convert.formats.svg import heat_map, lines, megabytes
from adapt_convert.formats.validation_html import CSS

_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
_CURVES = 7  # as many as the palette has colours


def plan_page(data: Mapping[str, Any]) -> str:
    """The page for the content of `plan --json`. Everything that came from outside is escaped."""
    sections = (_verdict(data), _charts(data), _kinds(data), _places(data), _candidates(data))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>Plan: {escape(_name(data["source"]))}</title>
<style>{CSS}</style></head><body><main>
{"".join(sections)}
</main></body></html>
"""


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _verdict(data: Mapping[str, Any]) -> str:
    advice = data["recommendation"]
    paths = shlex.join([data["base"], data["source"]])
    command = f"adapt-convert delta {paths} {advice['options']}" if advice["options"] else ""
    left_out = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in data["left_out"].items())
    return (
        f"<h1>Plan of {escape(_name(data['source']))}</h1><p class='soft wrap'>What was changed in {escape(data['base'])}, and what "
        f"adapters of it would hold: predicted from the weights alone. Energy is the squared change of the weights; how a model "
        f"behaves, <code>adapt-convert validate</code> measures.</p>"
        f"<div class='card verdict{'' if command else ' bad'} wrap'><b>{escape(advice['sentence'])}</b></div>"
        + (f"<pre>{escape(command)}</pre>" if command else "")
        + (f"<p class=soft>Not predicted:</p><ul class='soft wrap'>{left_out}</ul>" if left_out else "")
    )


def _charts(data: Mapping[str, Any]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in data["candidates"]:
        series.setdefault(series_of(row), []).append((float(row["bytes"]), row["captured_of_matrices"]))
    frontier = [(name, sorted(points)) for name, points in series.items()]
    marks = {"half": data["full_bytes"] / 2, "full": float(data["full_bytes"])}
    sizes = lines(frontier, ("bytes on disk", "captured change"), False, marks, True, _numbers(series), show_x=megabytes)
    largest = sorted(data["spectra"], key=lambda kind: -data["kinds"][kind]["share"])[:_CURVES]
    curves = [(kind, [(rank, share) for rank, share in data["spectra"][kind]]) for kind in largest]
    curves = [(kind, points) for kind, points in curves if points]
    titles = ("rank", "captured change")
    spectra = lines(curves, titles, False, {}, True, _numbers(largest), show_x=lambda rank: f"{rank:g}") if curves else ""
    return (
        f"<h2>Size and spectrum</h2><div class=grid2><div class=card><h3>Size against captured change of the matrices</h3>{sizes}"
        f"<p class=soft>Full: all changed tensors as they are. S: segments, runs of layers with a basis each.</p></div>"
        f"<div class=card><h3>What a LoRA of one rank captures, by kind of matrix</h3>{spectra}</div></div>"
    )


def _numbers(names: Sequence[str] | Mapping[str, Any]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _kinds(data: Mapping[str, Any]) -> str:
    heads = ["", "share of the change", "matrices", "effective rank", "captured by rank 16"]
    heads += ["entries unchanged", "entries one step", "noise floor"]
    rows = [
        [
            escape(kind),
            percent(row["share"]),
            str(row["matrices"] or "-"),
            effective_rank(row),
            percent(row.get("captured_by_rank_16")),
            percent(row.get("unchanged_entries")),
            percent(row.get("one_step_entries")),
            percent(row.get("noise_floor")),
        ]
        for kind, row in data["kinds"].items()
    ]
    note = (
        "Effective rank: (sum of s&sup2;)&sup2; / sum of s&#8308; over the singular values s, the mean of the matrices. Noise floor: the "
        "energy of rounding errors, uniform over one step of the fine-tune's dtype, beside that of the change."
    )
    noise = f"<p>{rounding_line(data)}</p>" if rounding_line(data) else ""
    return f"<h2>What changed</h2>{noise}<div class='card scroll names'>{_table(heads, rows)}</div><p class=soft>{note}</p>"


def _places(data: Mapping[str, Any]) -> str:
    cells = {(row["kind"], row["layer"]): row["share"] for row in data["places"]}
    if not cells:
        return ""
    roles = [role for role in _ROLES if any(role == kind for kind, _ in cells)]
    layers = sorted({layer for _, layer in cells})
    drawn = heat_map(cells, roles, layers, "Share of the change by matrix", max(cells.values()))
    return (
        f"<h2>By layer and matrix</h2><div class=card><p class=soft>Share of everything that changed; full colour is "
        f"{percent(max(cells.values()))}.</p><div class=scroll>{drawn}</div></div>"
    )


def _candidates(data: Mapping[str, Any]) -> str:
    heads = ["options of adapt-convert delta", "size", "stored exactly", "captured of the matrices", "of what it factors", "of all changes"]
    rows = [
        [
            escape(row["options"]),
            size_text(row["bytes"]),
            size_text(row["bytes_exact"]),
            percent(row["captured_of_matrices"]),
            percent(row["captured_energy"]),
            percent(row["captured_energy_of_all_changes"]),
        ]
        for row in data["candidates"]
    ]
    return f"<h2>All candidates</h2><div class='card scroll names'>{_table(heads, rows)}</div>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
