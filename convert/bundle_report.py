"""What the bundles of both kinds say of themselves: names of tasks, and one report of several conversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Plan
from adapt_convert.convert.report import Record, build_report, captured_energy
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.source import Source


@dataclass(frozen=True)
class Bundled:
    """One adapter of a bundle, and what became of its tensors."""

    name: str
    source: Source
    plan: Plan
    records: Sequence[Record]


def names_apart(names: Sequence[str]) -> list[str]:
    """The names, numbered where they repeat."""
    apart: list[str] = []
    for number, name in enumerate(names, 1):
        apart.append(f"{name}-{number}" if name in apart else name)
    return apart


def bundle_report(base: Checkpoint, tasks: Sequence[Bundled], options: Options) -> dict[str, Any]:
    """The report of the first task's form, its tensors those of all tasks, and each task's own captured energy."""
    reports = [build_report(base, task.source, options, task.records, task.plan.missing) for task in tasks]
    records = [record for task in tasks for record in task.records]
    sources = [report["inputs"]["source"] for report in reports]
    return reports[0] | {
        "captured_energy": captured_energy(r for r in records if r.status == "factored"),
        "captured_energy_of_all_changes": captured_energy(records),
        "inputs": {
            "base": reports[0]["inputs"]["base"],
            "source": sources[0] | {"origin": ", ".join(s["origin"] for s in sources), "bytes": sum(s["bytes"] for s in sources)},
            "sources": sources,
        },
        "tasks": {task.name: report["captured_energy"] for task, report in zip(tasks, reports, strict=True)},
        "tensors": {f"{t.name}: {name}": row for t, r in zip(tasks, reports, strict=True) for name, row in r["tensors"].items()},
    }
