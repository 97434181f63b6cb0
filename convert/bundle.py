"""Several adapters of one base in one: as a LatTE or as a shared LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapt_convert.convert.conversion import Conversion
from adapt_convert.convert.latte.bundle import bundle as bundle_latte
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.shared_lora.bundle import bundle_loras


def bundle(
    base: str | Path, sources: Sequence[str | Path], *, to: str = "latte", progress: Progress = silent, **options: Any
) -> Conversion:
    """Put several fine-tunes or adapters of `base` into one adapter whose tasks can be mixed in one batch; task k is the k-th source.

    `to` is `latte` (convert/latte/bundle.py) or `shared-lora` (convert/shared_lora/bundle.py). Raises `AdaptError`.
    """
    if to == "shared-lora":
        return bundle_loras(base, sources, progress=progress, **options)
    return bundle_latte(base, sources, progress=progress, to=to, **options)
