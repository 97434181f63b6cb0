"""Folding an adapter into its base: a checkpoint that needs no adapter code to run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.architectures import aliases_of, is_head
from adapt_convert.convert.conversion import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, make_plan
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.formats.atomic import atomic_directory
from adapt_convert.formats.checkpoint_writer import copy_small_files, write_checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.safetensors_file import DTYPES, LazyTensor
from adapt_convert.formats.source import Source


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `base` with `adapter` folded in, in the base's dtypes, one tensor in memory at a time.

    Sums are taken in float32 and rounded once. Returns what was written: `output`, `bytes`, `shards`, `changed`.
    Raises `AdaptError`.
    """
    opened_base, source = open_pair(base, adapter, revision, base_revision)
    if source.kind == "checkpoint":
        raise AdaptError(f"{adapter}: is a full checkpoint, not an adapter; there is nothing to merge")
    options = Options()
    plan = make_plan(opened_base, source, options)
    pairs = Pairs(opened_base, source, options.torch_device())
    by_key: dict[str, Entry] = {e.base_key: e for e in plan.entries if e.base_key and not e.tied_to}
    for entry in plan.entries:
        if entry.tied_to and entry.base_key and entry.name.endswith(".bias") and entry.base_key not in by_key:
            by_key[entry.base_key] = entry  # PEFT can hold only the alias of a shared bias, and it is never untied
    by_key |= {copy: by_key[key] for copy, key in _stored_copies(pairs, plan).items() if key in by_key and copy not in by_key}
    tensors = {key: _merged(pairs, by_key.get(key), key) for key in opened_base.infos}
    # A head that the base shares with its embedding is stored on its own once the adapter gives it another value.
    added = [e for e in plan.entries if e.base_key is None or (e.tied_to and not _same_as_owner(pairs, by_key, e))]
    tensors |= {e.name: _merged(pairs, e, None) for e in added}
    left = _heads_left_behind(plan, source)
    tensors |= {alias: _merged(pairs, None, key) for alias, key in left.items()}
    with atomic_directory(Path(output), overwrite) as staging:
        size, shards = write_checkpoint(staging, _watched(tensors, progress))
        copy_small_files(opened_base.location.directory, staging, untie=bool(left) or any(e.tied_to for e in added))
        summary = {"output": str(output), "bytes": size, "shards": shards, "changed": len(by_key) + len(added)}
        (staging / "conversion.json").write_text(
            json.dumps({"target": "merged", "base": str(base), "adapter": str(adapter), **summary}, indent=1) + "\n"
        )
    return summary


def _heads_left_behind(plan: Plan, source: Source) -> dict[str, str]:
    """Heads that PEFT leaves as in the base while it changes the embedding they share -> the base's key of that value."""
    if plan.follows_ties:
        return {}
    return {
        alias: entry.base_key
        for entry in plan.entries
        if entry.base_key and entry.action != "drop"
        for alias in aliases_of(entry.name, plan.family, plan.config)
        if alias not in source.parts and alias not in plan.base_keys and is_head(alias) and alias.endswith(".weight")
    }


def _stored_copies(pairs: Pairs, plan: Plan) -> dict[str, str]:
    """Keys under which the base stores a shared value once more (a tied `lm_head`) -> the key of the value: one moves with the other."""
    if plan.family is None or not pairs.base.config.get("tie_word_embeddings", True):
        return {}
    keys = {plan.base_keys.get(alias): plan.base_keys.get(plan.full_name(owner)) for alias, owner in plan.family.tied.items()}
    infos = pairs.base.infos
    return {
        copy: key
        for copy, key in keys.items()
        if copy and key and infos[copy].dtype == infos[key].dtype and torch.equal(pairs.base.read(copy), pairs.base.read(key))
    }


def _same_as_owner(pairs: Pairs, by_key: dict[str, Entry], entry: Entry) -> bool:
    owner = by_key.get(entry.base_key or "")
    return owner is entry or (owner is not None and bool((pairs.value(owner) == pairs.value(entry)).all()))


def _merged(pairs: Pairs, entry: Entry | None, key: str | None) -> LazyTensor:
    info = pairs.base.infos[key] if key else None
    if entry is None:
        assert info is not None
        assert key is not None
        return LazyTensor(info.shape, DTYPES[info.dtype], lambda: pairs.base.read(key))
    shape = info.shape if info else entry.part.shape
    dtype = DTYPES[info.dtype if info else entry.part.dtype]

    def load() -> Tensor:
        value = pairs.value(entry).to(dtype)
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdaptError(f"{entry.name}: the merged value is not finite (NaN or Inf) in {dtype}; is {pairs.source.origin} damaged?")
        return value

    return LazyTensor(shape, dtype, load)


def _watched(tensors: dict[str, LazyTensor], progress: Progress) -> dict[str, LazyTensor]:
    """The same tensors, with `progress` moved on by each one that is written."""
    steps: Iterator[Any] = iter(progress(list(tensors), "merging"))

    def watch(tensor: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            next(steps, None)
            return tensor.load()

        return LazyTensor(tensor.shape, tensor.dtype, load)

    return {name: watch(tensor) for name, tensor in tensors.items()}
