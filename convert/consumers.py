"""What the program that will serve a LoRA cannot hold: left out of the plan beforehand, each tensor with the reason; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from adapt_convert.convert.architectures import aliases_of, is_head
from adapt_convert.convert.experts import is_expert
from adapt_convert.convert.image_loras import cannot_hold, form_of, namer
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.gguf_names import GgufNames
from adapt_convert.formats.profiles import IMAGE_FORMS, Profile, profile_named

if TYPE_CHECKING:
    from adapt_convert.convert.family import Family
    from adapt_convert.convert.options import Options
    from adapt_convert.convert.preflight import Entry, Plan
    from adapt_convert.convert.report import Record
    from adapt_convert.formats.checkpoint import Checkpoint

LARGEST_LOSS = 0.5  # share of the squared change beyond which what is left is another model


def consumer_of(base: Checkpoint, options: Options) -> Profile | None:
    """The profile that was asked for, or of a diffusion model the usual one; None for what PEFT takes as it is.

    Raises `AdaptError` for one that has no place for adapters of this base.
    """
    form = form_of(base, options.profile)
    return options.consumer if form == "peft" else profile_named(form)


def restrict(plan: Plan, base: Checkpoint, profile: Profile) -> Plan:
    """The plan without what the consumer cannot hold, each with the reason; decided from headers alone.

    Raises `AdaptError` where nothing that it could be given would be the fine-tune: added tokens, and matrices of a kind that it
    does not adapt at all.
    """
    if profile.layout in IMAGE_FORMS:
        name_of = namer(base, profile.layout)
        return _without(plan, profile, lambda entry: cannot_hold(entry, name_of))
    model_type = str(plan.config.get("model_type"))
    if model_type in profile.types_without:
        raise AdaptError(f"{profile.title} has no LoRA for a {model_type}; serve the merged model")
    if not profile.conv1d and any(entry.transposed for entry in plan.having("factor")):
        raise AdaptError(f"{profile.title} has no LoRA for a {model_type}, whose matrices are stored (in, out)")
    grown = next((entry for entry in plan.entries if entry.rows_added and entry.action != "drop"), None)
    if grown and not profile.exact:
        raise AdaptError(
            f"{profile.title} cannot add the {grown.rows_added} rows by which {grown.name} outgrows the base, and whatever uses them "
            f"would fail; serve the merged model, or give up the whole change of it with --exclude {grown.module.rsplit('.', 1)[-1]}"
        )
    names = GgufNames.of(plan.config) if profile.layout == "gguf" else None
    return _without(plan, profile, lambda entry: _cannot_hold(entry, plan, profile, names))


def _without(plan: Plan, profile: Profile, why: Callable[[Entry], str | None]) -> Plan:
    """The plan with what `why` has a reason against left out, and a note for each reason."""
    entries, notes = [], dict[str, list[str]]()
    for entry in plan.entries:
        reason = why(entry)
        if reason:
            entry = replace(entry, action="drop", reason=f"{profile.title} {reason}")
            notes.setdefault(entry.reason, []).append(entry.name)
        entries.append(entry)
    lines = (f"{reason}: {listed[0]}{f' and {len(listed) - 1} more' if listed[1:] else ''}" for reason, listed in notes.items())
    return replace(plan, entries=tuple(entries), notes=(*plan.notes, *lines))


def _cannot_hold(entry: Entry, plan: Plan, profile: Profile, names: GgufNames | None) -> str | None:
    """Why the consumer cannot hold a tensor, or None when it can, or when it is left out already."""
    if entry.action == "drop" or profile.exact:
        return None
    model_type = str(plan.config.get("model_type"))
    # The base as the consumer loads it decides: there a table that two modules share is one tensor, whatever the source is.
    shared = [alias for alias in aliases_of(entry.name, plan.family, plan.config) if alias not in plan.base_keys]
    if profile.shared_tables and profile.adapts_table(model_type, head=True):
        shared = []
    # llama.cpp's graphs look the token table up with its LoRA, and every other table without.
    passed_over = names is not None and entry.kind == "embedding" and names.tensor(entry.module) not in ("token_embd.weight", None)
    head = is_head(entry.name)
    adaptable = profile.adapts_table(model_type, head) and not shared and not passed_over
    if entry.action == "store":
        if entry.name == f"{entry.module}.bias" and plan.is_factored(entry.module):
            return None if profile.biases else "has no LoRA of biases"
        if entry.kind == "embedding" and adaptable:
            return f"loads no whole tensors; --target-modules all-linear,{entry.module.rsplit('.', 1)[-1]} factors it"
        return "loads no whole tensors"
    if (entry.kind == "embedding" or head) and shared:
        return f"has no LoRA for a table that {shared[0]} shares"
    if (entry.kind == "embedding" or head) and not profile.adapts_table(model_type, head):
        return f"adapts no {'output head' if head else 'embedding'} of a {model_type}"
    if passed_over:
        return "adapts no embedding but that of the tokens"
    if head and entry.module != "lm_head":
        return "adapts no such head"
    if names is not None and names.tensor(entry.module) is None:
        return "has no tensor for it"
    if profile.modules is not None and entry.module.rsplit(".", 1)[-1] not in profile.modules:
        return "adapts no matrix of this name"
    if profile.layout == "peft" and model_type not in profile.stacked_types and _lies_in_a_stack(entry, plan.family):
        return f"takes no experts of a {model_type} in a stack, which is how PEFT names them"
    return None


def _lies_in_a_stack(entry: Entry, family: Family | None) -> bool:
    """Whether the matrix is part of a stack of experts that an adapter holds as a whole (`target_parameters`)."""
    experts = family.experts if family else None
    return bool(experts and (experts.by_parameter or experts.modules is None)) and is_expert(entry.module, family)


def share_left_out(records: Iterable[Record], profile: Profile) -> float:
    """The share of the squared change that is left out because of the consumer. Raises `AdaptError` when that is most of it.

    What the user has excluded does not count: that is no loss of the consumer's.
    """
    meant = [record for record in records if record.status != "dropped" or record.entry.lossy]
    lost = [record for record in meant if record.status == "dropped" and record.reason.startswith(f"{profile.title} ")]
    total = sum(record.energy for record in meant)
    share = sum(record.energy for record in lost) / total if total else 0.0
    if share > LARGEST_LOSS:
        largest = max(lost, key=lambda record: record.energy)
        raise AdaptError(
            f"{share:.0%} of the change would be left out, and what is left is not the fine-tune: {largest.reason} ({largest.entry.name}); "
            "serve the merged model, or say with --exclude what may be lost"
        )
    return share
