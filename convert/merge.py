"""Folding an adapter into its base: a checkpoint that needs no adapter code to run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.architectures import aliases_of, is_embedding, is_head
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, make_plan
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.formats.atomic import atomic_directory
from adapt_convert.formats.checkpoint_writer import DIFFUSERS_STEM, copy_small_files, write_checkpoint, write_pipeline
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import locate
from adapt_convert.formats.safetensors_file import LazyTensor
from adapt_convert.formats.source import Source, latte_config_path

_CHUNK = 2**20  # numbers measured at a time, in float64


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `base` with `adapter` folded in, in the base's dtypes or all in `dtype`, one tensor in memory at a time.

    Sums are taken in float32 and rounded once. Returns what was written: `output`, `bytes`, `shards`, `changed`, and
    `rounding_loss`: of all tensors that were rounded together, the energy `||written - sum||^2` over that of their change, as half
    precision loses a small change in part; `rounded_to` is the dtype, if any was rounded. Raises `AdaptError`.
    """
    if latte_config_path(locate(adapter, revision)) is not None:
        raise AdaptError(f"{adapter}: is a LatTE, which runs expanded and is never merged; merge the adapter that it was made from")
    opened_base, source = open_pair(base, adapter, revision, base_revision)
    if source.kind == "checkpoint":
        raise AdaptError(f"{adapter}: is a full checkpoint, not an adapter; there is nothing to merge")
    options = Options(dtype=dtype)
    plan = make_plan(opened_base, source, options)
    pairs = Pairs(opened_base, source, options.torch_device())
    by_key: dict[str, Entry] = {e.base_key: e for e in plan.entries if e.base_key and not e.tied_to}
    for entry in plan.entries:
        if entry.tied_to and entry.base_key and entry.name.endswith(".bias") and entry.base_key not in by_key:
            by_key[entry.base_key] = entry  # PEFT can hold only the alias of a shared bias, and it is never untied
    by_key |= {copy: by_key[key] for copy, key in _stored_copies(pairs, plan).items() if key in by_key and copy not in by_key}
    rounding = _Rounding()
    target = torch_dtype(dtype) if dtype else None
    tensors = {key: _merged(pairs, by_key.get(key), key, target, rounding) for key in opened_base.infos}
    # A head that the base shares with its embedding is stored on its own once the adapter gives it another value.
    added = [e for e in plan.entries if e.base_key is None or (e.tied_to and not _same_as_owner(pairs, by_key, e))]
    tensors |= {e.name: _merged(pairs, e, None, target, rounding) for e in added}
    left = _heads_left_behind(plan, source)
    tensors |= {alias: _merged(pairs, None, key, target, rounding) for alias, key in left.items()}
    for name, split in opened_base.store.splits.items():
        tensors[name] = _whole([tensors.pop(part) for part in split.parts], split.shape)
    with atomic_directory(Path(output), overwrite) as staging:
        watched, directory = _watched(tensors, progress), opened_base.location.directory
        if opened_base.is_pipeline:
            size, shards = write_pipeline(directory, staging, watched)
        else:
            size, shards = write_checkpoint(staging, watched, DIFFUSERS_STEM if "_class_name" in opened_base.config else "model")
            untie = bool(left) or any(e.tied_to for e in added)
            dequantised = opened_base.config if opened_base.quantisation else None
            rows = [e.part.shape[0] for e in plan.entries if e.rows_added and is_embedding(e.module)]
            copy_small_files(directory, staging, untie, dtype, dequantised, max(rows, default=None))
        summary = {"output": str(output), "bytes": size, "shards": shards, "changed": len(by_key) + len(added)}
        summary |= {"rounding_loss": rounding.loss} | ({"rounded_to": rounding.worst} if rounding.worst else {})
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


class _Rounding:
    """What writing costs: energies of the changes that were rounded, and of the errors by dtype, summed over tensors."""

    def __init__(self) -> None:
        self._change = 0.0
        self._errors: dict[str, float] = {}

    def add(self, base: Tensor, value: Tensor, written: Tensor) -> None:
        """One tensor: `base` and `written` as stored, `value` what the latter should be."""
        change, error = 0.0, 0.0
        for old, exact, new in zip(*(torch.split(tensor.reshape(-1), _CHUNK) for tensor in (base, value, written)), strict=True):
            change += float((exact.double() - old.double()).square().sum())
            error += float((new.double() - exact.double()).square().sum())
        name = str(written.dtype).removeprefix("torch.")
        self._change += change
        self._errors[name] = self._errors.get(name, 0.0) + error

    @property
    def loss(self) -> float:
        return sum(self._errors.values()) / self._change if self._change else 0.0

    @property
    def worst(self) -> str | None:
        """The dtype that lost most."""
        return max(self._errors, key=lambda name: self._errors[name], default=None)


def _merged(pairs: Pairs, entry: Entry | None, key: str | None, target: torch.dtype | None, rounding: _Rounding) -> LazyTensor:
    info = pairs.base.infos[key] if key else None
    shape = info.shape if info and not (entry and entry.rows_added) else entry.part.shape  # type: ignore[union-attr]
    stored = torch_dtype(info.dtype if info else entry.part.dtype)  # type: ignore[union-attr]
    dtype = target if target and stored.is_floating_point else stored

    def load() -> Tensor:
        if entry is None:
            assert key is not None
            return pairs.base.read(key).to(dtype)
        value = pairs.value(entry)
        written = value.to(dtype)
        if written.is_floating_point() and not torch.isfinite(written).all():
            raise AdaptError(f"{entry.name}: the merged value is not finite (NaN or Inf) in {dtype}; is {pairs.source.origin} damaged?")
        if key and written.dtype != value.dtype:
            old = pairs.base.read(key)
            rounding.add(old, value[: len(old)], written[: len(old)])
        return written

    return LazyTensor(shape, dtype, load)


def _whole(parts: list[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    """A tensor that was read in parts, as the base's files have it."""
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.load().flatten() for part in parts]).view(shape))


def _watched(tensors: dict[str, LazyTensor], progress: Progress) -> dict[str, LazyTensor]:
    """The same tensors, with `progress` moved on by each one that is written."""
    steps: Iterator[Any] = iter(progress(list(tensors), "merging"))

    def watch(tensor: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            next(steps, None)
            return tensor.load()

        return LazyTensor(tensor.shape, tensor.dtype, load)

    return {name: watch(tensor) for name, tensor in tensors.items()}
