"""What transformers makes of an unlisted architecture's tensors when it loads them, by its own table of conversions.

Checkpoints keep the names of their first release; where the model class has others today, an adapter needs the latter.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any


@functools.cache
def _conversions(model_type: str) -> tuple[list[Any], list[Any]]:
    """Renamings, and conversions that join or cut tensors. None of either without transformers."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return [], []
    theirs: Any = conversion_mapping
    found = theirs.get_checkpoint_conversion_mapping(model_type) or []
    return (
        [entry for entry in found if isinstance(entry, core_model_loading.WeightRenaming)],
        [entry for entry in found if isinstance(entry, core_model_loading.WeightConverter)],
    )


def knows_loading() -> bool:
    """Whether transformers is here to be asked."""
    return find_spec("transformers") is not None


def loaded_name(key: str, model_type: str) -> str | None:
    """The name in memory of the tensor `key`; None for one that is joined with others, cut or turned there."""
    renamings, converters = _conversions(model_type)
    if not renamings and not converters:
        return key
    from transformers import core_model_loading

    theirs: Any = core_model_loading
    name, converted = theirs.rename_source_key(key, renamings, converters)
    return None if converted else str(name)


def why_lost(key: str, name: str, is_matrix: bool, model_type: str) -> str | None:
    """Why an adapter cannot hold the tensor `key` of a checkpoint, called `name` in memory; None when it can."""
    if loaded_name(key, model_type) is None:
        return "joined, cut or turned when transformers loads it, which is not known for this architecture"
    if is_matrix and loaded_name(name, model_type) != name:  # PEFT renames the keys of factors as transformers does those of checkpoints
        return "under a name that PEFT would take for an older one, and change"
    return None
