"""What the `adapter_config.json` of a LoDA says; known without torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_convert.formats.errors import AdaptError

PEFT_TYPE = "LODA"
VARIANTS = ("loda", "loda+", "r-loda", "r-loda+", "s-loda", "s-loda+")
SLOPE = 0.8  # of the LeakyReLU below zero, as in the paper
EPSILON = 1e-5  # of the layer norm, torch's own
VERSION = 1


def check_loda_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse, with an `AdaptError`, a config of another version or of a map that this version does not compute."""
    if config.get("peft_type") != PEFT_TYPE or config.get("version") != VERSION:
        said = f"peft_type {config.get('peft_type')!r} version {config.get('version')!r}"
        raise AdaptError(f"{path}: {said}; this adapt-convert reads {PEFT_TYPE} version {VERSION}")
    if config.get("variant") not in VARIANTS:
        raise AdaptError(f"{path}: the variant {config.get('variant')!r} is not known")
    for key, value in (("negative_slope", SLOPE), ("layer_norm_eps", EPSILON)):
        if config.get(key) != value:
            raise AdaptError(f"{path}: {key} is {config.get(key)!r}; this adapt-convert computes {value} alone")
