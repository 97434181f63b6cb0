"""One conversion from end to end: open both sides, plan from headers, compare, solve, and write a directory."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapt_convert.convert.architectures import module_names
from adapt_convert.convert.calibration.calibrated import calibrated
from adapt_convert.convert.calibration.work import Work
from adapt_convert.convert.latte.solver import solve_latte
from adapt_convert.convert.lora import solve_lora, unstorable
from adapt_convert.convert.lorta.solver import reference_slots, solve_lorta
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.pieces import Pieces
from adapt_convert.convert.preflight import COMPUTED, Entry, Plan, make_plan, require_factors
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.report import Record, build_report, dropped, unchanged
from adapt_convert.formats.atomic import atomic_directory
from adapt_convert.formats.card import model_card
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, latte_config_path
from adapt_convert.formats.location import Location, locate, read_json
from adapt_convert.formats.lorta import LortaAdapter, read_lorta
from adapt_convert.formats.peft import LoraAdapter, read_lora
from adapt_convert.formats.shared_lora import SharedLoraAdapter, open_shared_lora, shared_lora_config_path
from adapt_convert.formats.source import Source, adapter_config_path, checkpoint_source

Adapter = LoraAdapter | LortaAdapter | LatteAdapter | SharedLoraAdapter
Solver = Callable[
    [Pairs, Plan, Options, dict[Entry, float], Progress],
    tuple[LoraAdapter, list[Record]] | tuple[LortaAdapter, list[Record]] | tuple[LatteAdapter, list[Record]],
]
SOLVERS: dict[str, Solver] = {"lora": solve_lora, "lorta": solve_lorta, "latte": solve_latte}


@dataclass
class Conversion:
    """A finished conversion: the adapter, its plan, and the report that `save` completes and writes beside it."""

    adapter: Adapter
    base: Checkpoint
    plan: Plan
    records: list[Record]
    report: dict[str, Any]
    started: float

    def save(self, directory: str | Path, overwrite: bool = False, measured: bool = True) -> Path:
        """Write the adapter, `conversion.json` and a model card, all or nothing. Returns the directory.

        Without `measured` the report leaves out time and memory, which alone differ between two runs.
        """
        path = Path(directory)
        with atomic_directory(path, overwrite) as staging:
            self.report["bytes"] = self.adapter.write(staging)
            self.report["bytes_exact"] = sum(tensor.nbytes for tensor in self.adapter.exact.values())
            if measured:
                self.report["seconds"] = round(time.monotonic() - self.started, 3)
                self.report["peak_memory"] = peak_memory()
            (staging / "conversion.json").write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            (staging / "README.md").write_text(model_card(self.report, self.plan.config, self.base.location), encoding="utf-8")
        return path


def convert(
    base: str | Path,
    source: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    task: str | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan, Source, Options], None] = lambda plan, source, options: None,
    pieces: Pieces | None = None,
    **options: Any,
) -> Conversion:
    """Convert a fine-tune of `base` - a checkpoint or an adapter, each a path or a Hub id - into an adapter.

    `options` are the fields of `Options`; `task` chooses one adapter of a shared LoRA, by name or number.
    `progress(iterable, what)` wraps the long loops; `on_plan` is told what will be done before it is; `pieces` keeps what is
    finished, tensor by tensor, for a run after an interruption. Raises `AdaptError` for anything that can be mended by the user,
    always before something is written.
    """
    started = time.monotonic()
    chosen = Options(**options)
    opened_base, opened_source = open_pair(base, source, revision, base_revision, task)
    chosen = chosen.with_budget_in_bytes(opened_base.store.nbytes)
    plan = make_plan(opened_base, opened_source, chosen)
    require_factors(plan, opened_base, chosen)
    on_plan(plan, opened_source, chosen)
    refuse_certain_losses(plan, chosen)
    pairs = Pairs(opened_base, opened_source, chosen.torch_device(), pieces)
    stored, lost, records = survey(pairs, plan, chosen, progress)
    calibration: dict[str, Any] = {}
    if chosen.calib is None:
        adapter, solved = SOLVERS[chosen.to](pairs, plan, chosen, stored, progress)
    else:
        adapter, solved, calibration = calibrated(Work(pairs, plan, stored, SOLVERS[chosen.to], progress), chosen)
    records += [with_lost_rows(record, lost) for record in solved]
    if not any(record.energy for record in records):
        raise AdaptError(f"{opened_source.origin} equals {opened_base.origin}: no tensor changed, nothing to convert")
    if not any(record.status == "factored" and record.energy for record in records):
        raise AdaptError(f"{opened_source.origin}: none of the targeted matrices changed; there is nothing to factor")
    if chosen.strict:
        _refuse_losses([f"{record.entry.name} ({record.reason})" for record in records if record.is_loss])
    order = {entry.name: position for position, entry in enumerate(plan.entries)}
    records.sort(key=lambda record: order[record.entry.name])
    adapter.base_model = opened_base.location.loadable
    if isinstance(adapter, LoraAdapter):  # PEFT alone has a place for it
        adapter.base_revision = opened_base.location.revision
    adapter.task_type = task_type(plan)
    report = build_report(opened_base, opened_source, chosen, records, plan.missing)
    if isinstance(adapter, LatteAdapter):
        report["latte"] = adapter.details
    if calibration:
        report["calibration"] = calibration
    return Conversion(adapter, opened_base, plan, records, report, started)


def open_pair(
    base: str | Path, source: str | Path, revision: str | None = None, base_revision: str | None = None, task: str | None = None
) -> tuple[Checkpoint, Source]:
    """Open both sides from headers; whether the source is a checkpoint or an adapter is detected."""
    opened_base = open_base(base, base_revision)
    return opened_base, open_source(opened_base, source, revision, task)


def open_base(base: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a full model from headers."""
    location = locate(base, revision)
    if adapter_config_path(location) or latte_config_path(location) or shared_lora_config_path(location):
        raise AdaptError(f"{base}: is an adapter; BASE has to be the full model that it was trained on")
    return Checkpoint(location)


def refuse_latte(source: Location) -> None:
    """Refuse, as something to convert, what is a LatTE already."""
    if latte_config_path(source) is not None:
        raise AdaptError(f"{source.origin}: is a LatTE already; convert the fine-tune, LoRA or LoRTA that it was made from")


def open_source(base: Checkpoint, source: str | Path, revision: str | None = None, task: str | None = None) -> Source:
    """Open a fine-tune or an adapter of `base` from headers; of a shared LoRA one `task`, by name or number."""
    location = locate(source, revision)
    config_path = adapter_config_path(location)
    refuse_latte(location)
    if shared_lora_config_path(location) is not None:
        return open_shared_lora(location).source(task)
    if task is not None:
        raise AdaptError(f"--task {task}: {source} is no shared LoRA, it holds one adapter alone")
    if config_path is None:
        checkpoint = Checkpoint(location)
        return checkpoint_source(checkpoint, module_names(checkpoint.infos, checkpoint.config))
    if read_json(config_path).get("peft_type") == "LORTA":
        return read_lorta(location, reference_slots(_modules(base), base.config))
    return read_lora(location)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """The modules of the model in memory that have a weight."""
    names = module_names(checkpoint.infos, checkpoint.config).values()
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def refuse_certain_losses(plan: Plan, options: Options) -> None:
    """With `--strict`, refuse what is certain to be lost before a tensor is read.

    That is rows and tensors that no adapter of the unresized base can hold, and tensors of whole layers that the source lacks.
    """
    if not options.strict:
        return
    losses = [f"{name} (not in the fine-tune)" for name in plan.missing if re.search(r"\.\d+\.", name)]
    losses += [f"{entry.name} ({_rows_reason(entry)})" for entry in plan.entries if entry.rows_lost and entry.action != "drop"]
    if options.to == "lora":
        for entry in plan.having("store"):
            reason = unstorable(plan, entry) if entry.base_key is None else None
            losses += [f"{entry.name} ({reason})"] if reason else []
    _refuse_losses(losses)


def _refuse_losses(losses: list[str]) -> None:
    if losses:
        more = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
        raise AdaptError(f"--strict: {losses[0]}{more} would be lost; leave out with --exclude what may be lost")


def survey(pairs: Pairs, plan: Plan, options: Options, progress: Progress) -> tuple[dict[Entry, float], dict[str, float], list[Record]]:
    """Read everything that is not factored: what has to be stored (with its energy), rows lost, and the records of the rest.

    It comes before the solving, so that a loss that `--strict` forbids is found before the long work starts.
    """
    stored: dict[Entry, float] = {}
    lost: dict[str, float] = {}
    records: list[Record] = []
    compared = [entry for entry in plan.entries if entry.action != "factor" or entry.rows_lost]
    for entry, (energy, lost_energy) in pairs.change_energies(progress(compared, "comparing")):
        if lost_energy:
            lost[entry.name] = lost_energy
        if entry.action == "factor":
            continue
        if energy == 0 and not lost_energy and entry.base_key is not None:
            records.append(unchanged(entry))
        elif entry.action == "drop":
            # What the model computes for itself is no change, however much of it a checkpoint carries.
            changed = energy + lost_energy if entry.lossy or entry.reason != COMPUTED else 0.0
            records.append(dropped(entry, changed, entry.reason))
        elif energy == 0 and lost_energy:
            records.append(dropped(entry, lost_energy, _rows_reason(entry)))
        else:
            stored[entry] = energy
    if options.strict:
        reasons = {e: unstorable(plan, e) for e in stored} if options.to == "lora" else {}
        losses = [f"{record.entry.name} ({record.reason})" for record in records if record.is_loss]
        _refuse_losses(losses + [f"{entry.name} ({reason})" for entry, reason in reasons.items() if reason])
    return stored, lost, records


def with_lost_rows(record: Record, lost: dict[str, float]) -> Record:
    """Of a tensor with more rows than the base only the base's rows could be kept: add what is missing.

    One that would have been exact counts as dropped; one that is factored is an approximation anyway.
    """
    missing = lost.get(record.entry.name, 0.0)
    if not missing:
        return record
    status = "dropped" if record.status == "exact" else record.status
    reason = f"{_rows_reason(record.entry)}; the others are kept"
    return replace(record, status=status, energy=record.energy + missing, residual=record.residual + missing, reason=reason)


def _rows_reason(entry: Entry) -> str:
    return f"{entry.rows_lost} rows beyond the base's cannot be loaded onto the unresized base"


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_type(plan: Plan) -> str | None:
    """PEFT's task type, from the model class in `config.json`.

    A classifier gets none: with one, PEFT would expect its head among the saved modules, whether it changed or not.
    """
    architecture = str((plan.config.get("architectures") or [""])[0])
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands `ru_maxrss` down from the process that started this one, whatever its size was
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
