"""What transformers makes of an unlisted architecture's tensors when it loads them, by its own table of conversions.

Checkpoints keep the names of their first release; where the model class has others today, an adapter needs the latter.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

_LABELS = "id2label", "label2id"  # names of classes, up to megabytes of them, that no tensor's name depends on


@functools.cache
def _conversions(config: str) -> tuple[list[Any], list[Any]]:
    """Renamings, and conversions that join or cut tensors, for a `config.json` without labels. None of either without transformers."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return [], []
    theirs: Any = conversion_mapping
    settings = json.loads(config)
    model = _without_weights(settings)
    # Parts of a model (the backbone below a head) have conversions of their own, so the model is asked where it can be built.
    if model is None:
        found = theirs.get_checkpoint_conversion_mapping(str(settings.get("model_type"))) or []
    else:
        found = theirs.get_model_conversion_mapping(model, add_legacy=False)
    return (
        [entry for entry in found if isinstance(entry, core_model_loading.WeightRenaming)],
        [entry for entry in found if isinstance(entry, core_model_loading.WeightConverter)],
    )


def _without_weights(config: dict[str, Any]) -> Any:
    """The model of a `config.json`, on PyTorch's meta device; None where transformers has no such class, or cannot build it."""
    import torch
    import transformers

    from adapt_convert.convert.validation.live_model import quiet

    name = str((config.get("architectures") or [""])[0])
    try:
        with quiet(), _offline(), torch.device("meta"):
            return getattr(transformers, name)(transformers.AutoConfig.for_model(**config))
    except Exception:  # code of many authors, run on settings of others: whatever it raises, the names are asked for without it
        return None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is asked of the Hub, where some models look for a backbone's configuration or for kernels when they are built."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def knows_loading() -> bool:
    """Whether transformers is here to be asked."""
    return find_spec("transformers") is not None


def loaded_name(key: str, config: Mapping[str, Any]) -> str | None:
    """The name in memory of the tensor `key`; None for one that is joined with others, cut or turned there."""
    renamings, converters = _conversions(json.dumps({k: v for k, v in config.items() if k not in _LABELS}, sort_keys=True))
    if not renamings and not converters:
        return key
    from transformers import core_model_loading

    theirs: Any = core_model_loading
    name, converted = theirs.rename_source_key(key, renamings, converters)
    return None if converted else str(name)


def why_lost(key: str, name: str, is_matrix: bool, config: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot hold the tensor `key` of a checkpoint, called `name` in memory; None when it can."""
    if loaded_name(key, config) is None:
        return "joined, cut or turned when transformers loads it, which is not known for this architecture"
    if is_matrix and loaded_name(name, config) != name:  # PEFT renames the keys of factors as transformers does those of checkpoints
        return "under a name that PEFT would take for an older one, and change"
    return None
