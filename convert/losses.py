"""What no adapter of the base could keep, known before a tensor is read."""

from __future__ import annotations

import re

from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import COMPUTED, Entry, Plan
from adapt_convert.formats.errors import AdaptError


def refuse_certain_losses(plan: Plan, options: Options) -> None:
    """With `--strict`, refuse what is certain to be lost before a tensor is read.

    That is tensors that no adapter can hold, and tensors of whole layers that the source lacks.
    """
    if not options.strict:
        return
    losses = [f"{name} (not in the fine-tune)" for name in plan.missing if re.search(r"\.\d+\.", name)]
    if options.to == "lora":
        for entry in plan.having("store"):
            reason = unstorable(plan, entry) if entry.base_key is None else None
            losses += [f"{entry.name} ({reason})"] if reason else []
    refuse_losses(losses)


def refuse_losses(losses: list[str]) -> None:
    if losses:
        more = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
        raise AdaptError(f"--strict: {losses[0]}{more} would be lost; leave out with --exclude what may be lost")


def unstorable(plan: Plan, entry: Entry) -> str | None:
    """Why PEFT cannot hold this tensor exactly, or None when it can: decided from the plan, before any work."""
    if entry.name == f"{entry.module}.bias" and plan.is_factored(entry.module):
        return None
    if plan.aliases(entry.name):
        return None
    if not entry.module:
        return "PEFT stores whole modules, and this parameter belongs to the model itself"
    if holds_others(plan, entry.module):
        return f"PEFT stores whole modules, and {entry.module} holds what is factored or left out"
    return None


def holds_others(plan: Plan, module: str) -> bool:
    """Whether a module is, or contains, a tensor that is factored or meant to stay as in the base."""
    return any(
        (entry.module == module or entry.module.startswith(f"{module}."))
        and (entry.action == "factor" or (entry.action == "drop" and entry.reason != COMPUTED))
        for entry in plan.entries
    )
