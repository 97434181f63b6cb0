"""What a user should know of a pair before its conversion starts, in a line each: the notes of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapt_convert.convert.family import FUSED
from adapt_convert.convert.loading import knows_loading
from adapt_convert.convert.options import Options, matches
from adapt_convert.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from adapt_convert.convert.preflight import Plan


def notes_of(plan: Plan, base: Checkpoint, options: Options) -> list[str]:
    """Slips in the options first, then what is particular about the base and about single tensors."""
    notes, entries = [f"--exclude {name} matches no module" for name in unmatched(plan, options)], plan.entries
    if base.quantisation:
        notes.append(f"the base is quantised ({base.quantisation}): what its rounding took away is part of every change")
    if plan.family is None and plan.config.get("model_type") and not knows_loading():
        notes.append(
            f"{plan.config['model_type']} is not listed: without transformers an adapter has the names of the files, even old ones"
        )
    for entry in entries:
        copies = len(plan.aliases(entry.name)) + 1
        if options.to == "lora" and entry.action == "store" and entry.kind == "embedding" and copies > 1:
            notes.append(f"{entry.name} is shared by {copies} modules, and PEFT stores it once for each")
        if options.to == "lora" and entry.action == "factor" and entry.kind == "embedding" and copies > 1:
            notes.append(f"{entry.name} is shared: PEFT runs its LoRA but merges it twice; merge with `adapt-convert merge`")
        if entry.base_key is None:
            notes.append(f"{entry.name} {list(entry.part.shape)} is not in the base")
        elif entry.part.kind == "replace" and entry.part.shape != base.infos[entry.base_key].shape:
            old, new = base.infos[entry.base_key].shape[0], entry.part.shape[0]
            what = f"{new - old} rows added" if new > old else f"{old - new} rows cut"
            notes.append(f"{entry.name} has {new} rows, the base {old}: {what} (vocabulary or classes changed)")
        if entry.tied_to:
            notes.append(f"{entry.name} shares {entry.tied_to} in the base")
        if len(entry.part.shape) == 3:
            notes.append(f"{entry.name} {list(entry.part.shape)} holds stacked matrices")
    notes += _unmergeable(plan, options)
    fused = {e.module.rsplit(".", 1)[-1]: FUSED[e.place.role] for e in entries if e.place and e.place.role in FUSED}
    notes += [f"fused matrices: {module} ({', '.join(parts)} in one weight)" for module, parts in sorted(fused.items())]
    return notes + [f"{name} of the base is not in the fine-tune" for name in plan.missing]


def _unmergeable(plan: Plan, options: Options) -> list[str]:
    """That PEFT's `merge_and_unload` refuses an adapter of changed biases with a matrix in it that has none, as in Qwen2: its `lora_bias`
    is one switch for all of them. A mixture of experts has its biases whole instead."""
    if options.to != "lora" or options.profile not in (None, "peft") or (plan.family and plan.family.experts):
        return []
    factored = [entry.module for entry in plan.having("factor") if entry.kind == "matrix"]
    biased = next((e.name for e in plan.having("store") if e.name == f"{e.module}.bias" and plan.is_factored(e.module)), None)
    bare = next((module for module in factored if f"{module}.bias" not in plan.base_keys), None)
    if biased is None or bare is None:
        return []
    return [f"if {biased} changed, PEFT runs the LoRA but refuses to merge it, as {bare} has no bias; merge with `adapt-convert merge`"]


def kept_ranks(plan: Plan, options: Options) -> list[str]:
    """That a LoRA of no given size is as large as its source, which of a shared LoRA's adapter is more than it had by itself; or of the
    largest of its ranks, for a consumer that wants one. Of a plan without what the consumer cannot hold."""
    if options.to != "lora" or options.has_size:
        return []
    factored = [entry for entry in plan.having("factor") if entry.part.kind == "low_rank"]
    ranks = {min(rank, *entry.matrix_shape) for entry in factored if (rank := entry.part.rank) and options.keeps(rank)}
    if not ranks:
        return []
    kept = f"rank {max(ranks)}, as in the source" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}, as in the source"
    if len(ranks) > 1 and options.consumer and options.consumer.uniform:
        kept = f"rank {max(ranks)} for all, the largest of the source's, as {options.consumer.title} takes one rank"
    return [f"no size is given: {kept}; --rank N makes it smaller"]


def unmatched(plan: Plan, options: Options) -> list[str]:
    """What `--exclude` names and no module is called, of the source, of the base, or tied."""
    names = [*plan.base_keys, *(plan.family.tied if plan.family else ())]
    known = {entry.module for entry in plan.entries} | {name.rpartition(".")[0] for name in names}
    return [pattern for pattern in options.exclude if not any(matches(module, pattern) for module in known)]
