"""What the bundles of both kinds say of themselves: names of tasks, what rows cannot have apart, and one report of several conversions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.report import Record, build_report, captured_energy
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import Source

_NAMED = 3  # tensors that a refusal names one by one


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


def refuse_shared(found: Mapping[str, Sequence[Entry]], exclude: Sequence[str], factored: Collection[str] = ()) -> None:
    """Refuse changes that no row of a batch can have for itself; `found` are such tensors, by the source that changes them.

    The advice has the modules of all of them beside those of `exclude`, so that one list mends the bundle. Where it has some of the
    `factored` ones, whose matrices could stay but for their biases, it says that these go too, and what would hold both.
    """
    origins = [origin for origin, entries in found.items() if entries]
    if not origins:
        return
    changed = list({entry.name: entry for entries in found.values() for entry in entries}.values())
    names = [entry.name for entry in changed[:_NAMED]] + ([f"{len(changed) - _NAMED} more"] if len(changed) > _NAMED else [])
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    who, alone = f"{origins[0]}: changes", "convert this one on its own"
    if origins[1:]:
        who, alone = f"{origins[0]} and {len(origins) - 1} more of the sources: change", "convert these one by one"
    modules = ",".join(dict.fromkeys([*exclude, *(_to_exclude(entry.module) for entry in changed)]))
    biased = dict.fromkeys(_to_exclude(entry.module) for entry in changed if entry.module in factored and entry.name.endswith(".bias"))
    cost = ""
    if biased:
        cost = f" (the matrices of {', '.join(biased)} go with their biases, which a shared LoRA cannot hold; --to latte folds them)"
    raise AdaptError(f"{who} {listed}, which all rows of a batch share; leave out with --exclude {modules}{cost}, or {alone}")


def _to_exclude(module: str) -> str:
    """The shortest name that means a module: its last component, unless that is a number, which others have too."""
    last = module.rpartition(".")[2]
    return module if last.isdecimal() else last


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
