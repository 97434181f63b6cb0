"""Opening the two sides of a conversion: from headers, and without torch where both are safetensors checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from adapt_convert.convert.architectures import family_of, module_names, without_prefix
from adapt_convert.convert.experts import split_stacks
from adapt_convert.convert.options import Options
from adapt_convert.formats.checkpoint import Checkpoint, TensorStore
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.gguf_header import gguf_adapter
from adapt_convert.formats.location import Location, locate, read_json
from adapt_convert.formats.loda_config import PEFT_TYPE as LODA
from adapt_convert.formats.lora_names import lora_file
from adapt_convert.formats.source import LORTA, Source, adapter_config_path, checkpoint_source, latte_config_path, shared_lora_config_path

_BLOCK = 2**20  # numbers that are compared at a time


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
    checkpoint = Checkpoint(location, dequantised=True)
    split_stacks(checkpoint.store, checkpoint.origin, family_of(checkpoint.config))
    return checkpoint


def refuse_latte(source: Location) -> None:
    """Refuse, as something to convert, what is a LatTE already."""
    if latte_config_path(source) is not None:
        raise AdaptError(f"{source.origin}: is a LatTE already; convert the fine-tune, LoRA or LoRTA that it was made from")


def open_source(base: Checkpoint, source: str | Path, revision: str | None = None, task: str | None = None) -> Source:
    """Open a fine-tune or an adapter of `base` from headers; of a shared LoRA one `task`, by name or number."""
    location = locate(source, revision)
    refuse_latte(location)
    if shared_lora_config_path(location) is not None:
        from adapt_convert.formats.shared_lora import open_shared_lora

        return open_shared_lora(location).source(task)
    if task is not None:
        raise AdaptError(f"--task {task}: {source} is no shared LoRA, it holds one adapter alone")
    if config_path := adapter_config_path(location):
        return _open_adapter(base, location, read_json(config_path))
    if path := lora_file(location):
        from adapt_convert.formats.lora_file import read_lora_file

        return read_lora_file(location, path, base, _parameters(base))
    if gguf_adapter(location):
        raise AdaptError(f"{location.origin}: a GGUF adapter is not read back; convert the PEFT adapter that it was made from")
    checkpoint = Checkpoint(location)
    split_stacks(checkpoint.store, checkpoint.origin, family_of(checkpoint.config) or family_of(base.config))
    return checkpoint_source(checkpoint, module_names(checkpoint.infos, checkpoint.config))


def default_name(source: Location, options: Options, task: str | None = None) -> str:
    """What to call the output: `ft-lora-r16`, for a consumer `ft-lora-r16-vllm`; `style-lora` for a LoRA whose ranks stay what they are."""
    return options.output_name(f"{source.name}-{task}" if task else source.name, is_lora(source))


def is_lora(source: Location) -> bool:
    """Whether a source is a LoRA, which keeps its ranks unless a size is asked for. Raises `AdaptError` for a damaged configuration."""
    if config := adapter_config_path(source):
        from adapt_convert.formats.peft import is_plain_lora

        return is_plain_lora(read_json(config))
    return bool(lora_file(source) or shared_lora_config_path(source))


def _open_adapter(base: Checkpoint, location: Location, config: Mapping[str, Any]) -> Source:
    """Open a directory that has an `adapter_config.json`."""
    peft_type = config.get("peft_type")
    if peft_type == LODA:
        raise AdaptError(f"{location.origin}: is a LoDA, which is no change of weights: it can be neither merged nor converted, only run")
    if peft_type == LORTA:
        from adapt_convert.convert.lorta.solver import reference_slots
        from adapt_convert.formats.lorta import read_lorta

        return read_lorta(location, reference_slots(_modules(base), base.config))
    from adapt_convert.formats.peft import is_plain_lora, read_lora
    from adapt_convert.formats.peft_methods import read_method

    family = family_of(base.config)
    if is_plain_lora(config):
        by_short = {without_prefix(name, family): key for name, key in _parameters(base).items()}

        def is_of_base(parameter: str, store: TensorStore, key: str) -> bool:
            own = by_short.get(without_prefix(parameter, family))
            return own is not None and _is_equal(base.store, own, store, key)

        return read_lora(location, family.experts if family else None, is_of_base)
    return read_method(location, base, _parameters(base), bool(family and family.conv1d))


def _parameters(base: Checkpoint) -> dict[str, str]:
    """The base's tensors by the names of the parameters in memory."""
    return {name: key for key, name in module_names(base.infos, base.config).items()}


def _is_equal(base: TensorStore, key: str, store: TensorStore, copy: str) -> bool:
    """Whether a tensor is one of the base's, rounded to the dtype of the copy; compared in blocks, up to the first difference."""
    if base.infos[key].shape != store.infos[copy].shape:
        return False
    pairs = zip_longest(base.blocks(key, _BLOCK), store.blocks(copy, _BLOCK))
    return all(ours is not None and theirs is not None and bool(ours.to(theirs.dtype).equal(theirs)) for ours, theirs in pairs)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """The modules of the model in memory that have a weight."""
    names = module_names(checkpoint.infos, checkpoint.config).values()
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
