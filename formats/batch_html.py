"""The summary of a batch as one self-contained page, with a link to every report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from adapt_convert.formats.sizes import size_text
from adapt_convert.formats.validation_html import CSS

_LINKS = (("conversion.json", "report"), ("README.md", "card"), ("validation.html", "validation"))


def batch_page(summary: Mapping[str, Any]) -> str:
    """The page of `batch.json`; links are relative to the batch's directory."""
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items())
    bad = summary["exit_code"] != 0
    lines = read_lines(summary) + ([summary["error"]] if "error" in summary else [])
    notes = "".join(f"<li>{escape(line)}</li>" for line in lines)
    head = "".join(f"<th>{title}</th>" for title in ("output", "source", "target", "status", "captured energy", "size", ""))
    rows = "".join(_row(row) for row in summary["jobs"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Batch of {len(summary["jobs"])} conversions</title><style>{CSS}</style></head><body><main>
<h1>Batch of {len(summary["jobs"])} conversions</h1>
<div class="card verdict{" bad" if bad else ""}"><b>{escape(counts)}</b><ul>{notes}</ul></div>
<div class="scroll"><table><tr>{head}</tr>
{rows}</table></div>
</main></body></html>
"""


def read_lines(summary: Mapping[str, Any]) -> list[str]:
    """How often the tensors of each base were read, a line for each base."""
    kinds = (("sharing_jobs", "shared_reads", "jobs that share them"), ("other_jobs", "other_reads", "other jobs"))
    return [
        f"{row['base']}: {row['tensors']} tensors; "
        + ", ".join(f"{row[reads]} reads for {row[jobs]} {who}" for jobs, reads, who in kinds if row[jobs])
        for row in summary["bases"]
    ]


def _row(row: Mapping[str, Any]) -> str:
    done = row["status"] != "failed"
    links = " ".join(
        f'<a href="{quote(row["output"])}/{name}">{title}</a>'
        for name, title in _LINKS
        if done and (name[:5] != "valid" or row["validated"])
    )
    status = escape(row["status"]) + (f'<br><span class="soft wrap">{escape(row["error"])}</span>' if row.get("error") else "")
    energy = f"{row['captured_energy']:.2%}" if done and row["captured_energy"] is not None else "-"
    cells = [escape(row["output"]), escape(row["source"]), row["to"], status, energy, size_text(row["bytes"]) if done else "-", links]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
