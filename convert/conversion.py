"""One conversion from end to end: open both sides, plan from headers, compare, solve, and write a directory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.convert.consumers import consumer_of, share_left_out
from adapt_convert.convert.fitting import fit
from adapt_convert.convert.latte.solver import solve_latte
from adapt_convert.convert.lora import solve_lora
from adapt_convert.convert.lorta.solver import solve_lorta
from adapt_convert.convert.losses import refuse_certain_losses, refuse_losses, unstorable
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.pieces import Pieces
from adapt_convert.convert.preflight import COMPUTED, Entry, Plan, make_plan, require_factors
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.rank_for_budget import settle_budget
from adapt_convert.convert.report import Record, build_report, dropped, unchanged
from adapt_convert.formats.atomic import atomic_directory
from adapt_convert.formats.card import model_card
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.gguf_adapter import GgufAdapter
from adapt_convert.formats.image_lora import ImageLora
from adapt_convert.formats.latte import LatteAdapter
from adapt_convert.formats.loda import LodaAdapter
from adapt_convert.formats.lorta import LortaAdapter
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.shared_lora import SharedLoraAdapter
from adapt_convert.formats.source import Source

Adapter = LoraAdapter | ImageLora | GgufAdapter | LortaAdapter | LatteAdapter | LodaAdapter | SharedLoraAdapter
Solver = Callable[
    [Pairs, Plan, Options, dict[Entry, float], Progress],
    tuple[LoraAdapter, list[Record]] | tuple[LortaAdapter, list[Record]] | tuple[LatteAdapter, list[Record]],
]
OnPlan = Callable[[Plan, Checkpoint, Source, Options], None]
SOLVERS: dict[str, Solver] = {"lora": solve_lora, "lorta": solve_lorta, "latte": solve_latte}  # without text


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
    on_plan: OnPlan | None = None,
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
    chosen.require_text()
    opened = open_pair(base, source, revision, base_revision, task)
    return convert_opened(*opened, chosen, started, progress=progress, on_plan=on_plan, pieces=pieces)


def convert_opened(
    opened_base: Checkpoint,
    opened_source: Source,
    chosen: Options,
    started: float,
    *,
    progress: Progress = silent,
    on_plan: OnPlan | None = None,
    pieces: Pieces | None = None,
) -> Conversion:
    """The same of two sides that are open, `started` seconds of `time.monotonic()` ago."""
    plan = make_plan(opened_base, opened_source, chosen)
    require_factors(plan, opened_base, chosen)
    budget = chosen.budget
    plan, chosen = settle_budget(plan, opened_base, opened_source, chosen)
    if on_plan:
        on_plan(plan, opened_base, opened_source, chosen)
    refuse_certain_losses(plan, chosen)
    pairs = Pairs(opened_base, opened_source, chosen.torch_device(), pieces)
    stored, records = survey(pairs, plan, chosen, progress)
    calibration: dict[str, Any] = {}
    if chosen.calib is None:
        adapter, solved = SOLVERS[chosen.to](pairs, plan, chosen, stored, progress)
    else:
        adapter, solved, calibration = _solve_with_text(pairs, plan, chosen, stored, progress)
    records += solved
    _require_change(records, opened_base, opened_source, chosen)
    if chosen.strict:
        refuse_losses([f"{record.entry.name} ({record.reason})" for record in records if record.is_loss])
    order = {entry.name: position for position, entry in enumerate(plan.entries)}
    records.sort(key=lambda record: order[record.entry.name])
    adapter.base_model = opened_base.location.loadable
    if isinstance(adapter, LoraAdapter):  # PEFT alone has a place for it
        adapter.base_revision = opened_base.location.revision
    adapter.task_type = task_type(plan)
    report = build_report(opened_base, opened_source, chosen, records, plan.missing)
    if budget is not None:
        report["budget"] = budget
    if isinstance(adapter, LatteAdapter | LodaAdapter):
        report["latte" if isinstance(adapter, LatteAdapter) else "loda"] = adapter.details
    if calibration:
        report["calibration"] = calibration
    if isinstance(adapter, LoraAdapter) and (consumer := consumer_of(opened_base, chosen)):
        fitted = fit(adapter, plan, opened_base, consumer)
        report["profile"] = fitted.to_json(share_left_out(records, consumer))
        return Conversion(fitted.adapter, opened_base, plan, records, report, started)
    return Conversion(adapter, opened_base, plan, records, report, started)


def _solve_with_text(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[Any, list[Record], dict[str, Any]]:
    """As a `Solver` does, but by `--calib`; and what the report says of it."""
    from adapt_convert.convert.calibration.calibrated import calibrated  # what runs models takes long to import
    from adapt_convert.convert.calibration.work import Work

    return calibrated(Work(pairs, plan, stored, SOLVERS.get(options.to), progress), options)


def _require_change(records: list[Record], base: Checkpoint, source: Source, options: Options) -> None:
    """Raise `AdaptError` when no matrix changed, unless a LoRA stores what the base lacks: added tokens, a new head."""
    if not any(record.energy for record in records):
        raise AdaptError(f"{source.origin} equals {base.origin}: no tensor changed, nothing to convert")
    if any(record.status == "factored" and record.energy for record in records):
        return
    has_new = any(record.status == "exact" and (record.entry.rows_added or record.entry.base_key is None) for record in records)
    if options.to == "lora" and has_new:
        return
    advice = "--to lora stores what the fine-tune added" if has_new else "there is nothing to factor"
    raise AdaptError(f"{source.origin}: none of the targeted matrices changed; {advice}")


def survey(pairs: Pairs, plan: Plan, options: Options, progress: Progress) -> tuple[dict[Entry, float], list[Record]]:
    """Read everything that is not factored: what has to be stored (with its energy), and the records of the rest.

    It comes before the solving, so that a loss that `--strict` forbids is found before the long work starts.
    """
    stored: dict[Entry, float] = {}
    records: list[Record] = []
    compared = [entry for entry in plan.entries if entry.action != "factor"]
    for entry, (common, added) in pairs.change_energies(progress(compared, "comparing")):
        energy = common + added
        if energy == 0 and entry.base_key is not None:
            records.append(unchanged(entry))
        elif entry.action == "drop":
            # What the model computes for itself is no change, however much of it a checkpoint carries.
            changed = energy if entry.lossy or entry.reason != COMPUTED else 0.0
            records.append(dropped(entry, changed, entry.reason))
        else:
            stored[entry] = energy
    if options.strict:
        reasons = {e: unstorable(plan, e) for e in stored} if options.to == "lora" else {}
        losses = [f"{record.entry.name} ({record.reason})" for record in records if record.is_loss]
        refuse_losses(losses + [f"{entry.name} ({reason})" for entry, reason in reasons.items() if reason])
    return stored, records


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_type(plan: Plan) -> str | None:
    """PEFT's task type, from the model class in `config.json`.

    A classifier or a model that answers questions gets none: with one, PEFT would save its head whole, whether it changed or not, and take
    no factors of it. Nor does a model
    of speech, whose input PEFT would not hand on.
    """
    architecture = str((plan.config.get("architectures") or [""])[0])
    if architecture.endswith("ForConditionalGeneration") and (not plan.config.get("is_encoder_decoder") or plan.config.get("num_mel_bins")):
        return None  # a language model that also sees, or one that listens
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
