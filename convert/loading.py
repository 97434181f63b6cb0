"""What transformers makes of an unlisted architecture's tensors when it loads them, by its own table of conversions.

Checkpoints keep the names of their first release; where the model class has others today, an adapter needs the latter.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _conversions(model_type: str) -> tuple[list[Any], list[Any]]:
    """Renamings, and conversions that join or cut tensors. None of either without transformers: nothing runs the adapter then."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    found = get_checkpoint_conversion_mapping(model_type) or []  # type: ignore[no-untyped-call]
    return [entry for entry in found if isinstance(entry, WeightRenaming)], [entry for entry in found if isinstance(entry, WeightConverter)]


def loaded_name(key: str, model_type: str) -> str | None:
    """The name in memory of the tensor `key`; None for one that is joined with others, cut or turned there, or that would be renamed once
    more: PEFT renames the keys of an adapter in the same way, and would not find it."""
    renamings, converters = _conversions(model_type)
    if not renamings and not converters:
        return key
    from transformers.core_model_loading import rename_source_key

    name, converted = rename_source_key(key, renamings, converters)
    return None if converted or rename_source_key(name, renamings, converters)[0] != name else str(name)
