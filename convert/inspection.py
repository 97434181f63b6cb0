"""What is in a model or an adapter, and what a conversion of a pair would do: from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from adapt_convert.convert.architectures import family_of, place_of
from adapt_convert.convert.losses import refuse_certain_losses
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.prediction import predict
from adapt_convert.convert.preflight import Plan, make_plan, require_factors
from adapt_convert.formats.checkpoint import Checkpoint, TensorStore, gguf_file, weight_files
from adapt_convert.formats.gguf_header import GgufHeader, gguf_adapter, read_gguf_header
from adapt_convert.formats.location import locate, read_json
from adapt_convert.formats.loda_config import PEFT_TYPE as LODA
from adapt_convert.formats.lora_names import lora_file, slot_of
from adapt_convert.formats.quantised_headers import describe_quantisation
from adapt_convert.formats.source import LATTE_WEIGHTS, Source, adapter_config_path, latte_config_path, shared_lora_config_path

_GGUF_BASE = "dequantised as it is read, where transformers knows its architecture (extra `gguf`)"


def inspect(
    path: str | Path,
    other: str | Path | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    task: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Describe one model or adapter, or the pair of a base and its fine-tune. Reads headers, and of tensors no more than opening needs.

    `revision` is that of the last Hub id given, `task` chooses one adapter of a shared LoRA. With `other` the result is the plan of
    a conversion with the given `options`, as `describe_plan` has it. Raises `AdaptError`.
    """
    if other is None:
        return _describe(path, revision)
    chosen = Options(**options)
    chosen.require_text()
    base, source = open_pair(path, other, revision, base_revision, task)
    plan = make_plan(base, source, chosen)
    require_factors(plan, base, chosen)
    if chosen.budget is not None:
        from adapt_convert.convert.rank_for_budget import settle_budget  # needs torch

        plan, chosen = settle_budget(plan, base, source, chosen)
    refuse_certain_losses(plan, chosen)
    return describe_plan(plan, base, source, chosen)


def _describe(path: str | Path, revision: str | None) -> dict[str, Any]:
    location = locate(path, revision)
    config_path, latte_path = adapter_config_path(location), latte_config_path(location)
    extra: dict[str, Any]
    quantised: dict[str, Any] = {}
    if not config_path and (found := gguf_adapter(location)):
        gguf, header = found
        return {"path": str(path), "kind": "GGUF adapter", "method": header.adapter, **_of_gguf(gguf, header)}
    if not config_path and (gguf_model := gguf_file(location)):
        header = read_gguf_header(gguf_model)
        about = {"model_type": header.architecture, "layers": header.layers, "quantisation": "GGUF", "as_base": _GGUF_BASE}
        return {"path": str(path), "kind": "checkpoint", **about, **_of_gguf(gguf_model, header)}
    if latte_path:
        config, store, kind = read_json(latte_path), TensorStore([location.directory / LATTE_WEIGHTS]), "LATTE"
        extra = {name: config.get(name) for name in ("construction", "segments", "tasks", "model_type")}
        extra |= {"base_model": config.get("base_model_name_or_path")}
    elif shared_lora_config_path(location):
        from adapt_convert.formats.shared_lora import open_shared_lora

        shared = open_shared_lora(location)
        store, kind = shared.store, "SHARED_LORA"
        extra = {"rank": shared.config.get("r"), "tasks": list(shared.names), "base_model": shared.config.get("base_model_name_or_path")}
    elif config_path:
        config, store = read_json(config_path), TensorStore(weight_files(location))
        kind = str(config.get("peft_type", "unknown adapter"))
        extra = {"rank": config.get("r"), "base_model": config.get("base_model_name_or_path")}
        if kind == LODA:
            extra |= {name: config.get(name) for name in ("variant", "base_rank", "keep")}
    elif file := lora_file(location):
        config, store, kind = {}, TensorStore([file]), "LoRA file"
        extra = {"modules": len({slot[0] for slot in map(slot_of, store.infos) if slot})}
    else:
        checkpoint = Checkpoint(location, as_stored=True)
        config, store, kind = checkpoint.config, checkpoint.store, "pipeline" if checkpoint.is_pipeline else "checkpoint"
        extra = {"model_type": config.get("model_type"), "layers": _layers(store, config)}
        extra |= (quantised := describe_quantisation(checkpoint))
    dtypes = Counter[str]()
    for info in store.infos.values():
        dtypes[info.dtype] += math.prod(info.shape)
    return {
        "path": str(path),
        "kind": kind,
        **extra,
        "files": [file.name for file in store.files],
        "tensors": len(store.infos),
        "parameters": quantised.get("parameters", sum(dtypes.values())),
        "bytes": store.nbytes,
        "dtypes": dict(dtypes.most_common()),
    }


def _of_gguf(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The size of a GGUF file, and how many numbers are stored in which type."""
    types = Counter[str]()
    for name, shape in header.shapes.items():
        types[header.types[name]] += math.prod(shape)
    modules = {"modules": len({name.rpartition(".")[0] for name in header.shapes})} if header.kind == "adapter" else {}
    return {
        **modules,
        "files": [path.name],
        "tensors": len(header.shapes),
        "parameters": sum(types.values()),
        "bytes": path.stat().st_size,
        "dtypes": dict(types.most_common()),
    }


def _layers(store: TensorStore, config: dict[str, Any]) -> int | None:
    family = family_of(config)
    if family is None:
        return None
    places = (place_of(name.rpartition(".")[0], family) for name in store.infos)
    return len({(place.block, place.layer) for place in places if place}) or None


def describe_plan(plan: Plan, base: Checkpoint, source: Source, options: Options) -> dict[str, Any]:
    """The plan as plain data: `actions` counts what would become of changed tensors, `losses` what could not be kept."""
    return {
        "tensors": len(plan.entries),
        "actions": dict(Counter(entry.action for entry in plan.entries)),
        "losses": {entry.name: entry.reason for entry in plan.having("drop") if entry.lossy},
        "missing_from_source": list(plan.missing),
        "notes": list(plan.notes),
        **predict(plan, base, source, options).to_json(),
    }
