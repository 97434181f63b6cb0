"""What the headers of a quantised checkpoint say: its format, how many numbers the model has, and whether it can be a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.quantised import ACTIVATIONS, FP8, SCALES, bitsandbytes_names, quantisation_of
from adapt_convert.formats.safetensors_file import TensorInfo

_BESIDE = {  # what goes with packed codes, by how the codes are called
    "qweight": ("qzeros", "scales", "g_idx"),
    "weight_packed": (
        *("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_global_scale", "input_scale"),
    ),
}


def describe_quantisation(checkpoint: Checkpoint) -> dict[str, Any]:
    """`quantisation`, the name of the format; `bits` of a code; `parameters` of the model, None where headers do not tell; and `as_base`,
    what a conversion would do with it. Empty for plain weights. `checkpoint` has been opened as it is stored."""
    infos, config = checkpoint.infos, checkpoint.config
    found = quantisation_of(config, infos)
    if found is None:
        return {}
    bits = _bits(infos, config)
    return {
        "quantisation": _name(found[0], infos, bool(config.get("quantization_config"))),
        "bits": bits,
        "as_base": _as_base(checkpoint),
        "parameters": _parameters(infos, bits),
    }


def _name(stated: str, infos: Mapping[str, TensorInfo], is_named: bool) -> str:
    """The format as its owner spells it. Where config.json names none, FP8 goes by the codes, GPTQ and AWQ by the side that is packed."""
    if is_named:
        return {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}.get(stated.lower(), stated)
    if any(info.dtype in FP8 for info in infos.values()):
        return "FP8"
    codes = next((name for name in infos if name.endswith(".qweight")), None)
    scales = infos.get(codes.removesuffix("qweight") + "scales") if codes else None
    if codes is None or scales is None:
        return stated
    return "GPTQ" if scales.shape[-1:] == infos[codes].shape[-1:] else "AWQ"


def _as_base(checkpoint: Checkpoint) -> str:
    """Asked of the reader itself, but for bitsandbytes: that would have to be loaded first."""
    if any(name.endswith((".absmax", ".SCB")) for name in checkpoint.infos):
        return "dequantised by bitsandbytes as it is read (extra `quant`)"
    try:
        Checkpoint(checkpoint.location, dequantised=True)
    except AdaptError as error:
        return f"refused: {error}"
    return "dequantised as it is read"


def _bits(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int | None:
    """Of one code. None where neither the headers nor config.json say it."""
    for name, info in infos.items():
        if info.dtype in FP8 or name.endswith(".SCB"):
            return 8
        if name.endswith(".absmax") or (name.endswith("_blocks") and name.removesuffix("blocks") + "scales" in infos):
            return 4
        if name.endswith(".qzeros"):  # (groups, out * bits / 32), beside scales (groups, out)
            scales = infos.get(name.removesuffix("qzeros") + "scales")
            if scales is not None and scales.shape[-1:] and scales.shape[-1] and info.shape[-1:]:
                return round(32 * info.shape[-1] / scales.shape[-1])
    return _stated_bits(config.get("quantization_config"))


def _stated_bits(stated: Any) -> int | None:
    """What a `quantization_config` says of its codes, whether in GPTQ's, AWQ's or compressed-tensors' words."""
    if not isinstance(stated, dict):
        return None
    groups = stated.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    numbers = (place.get(key) for place in (stated, *weights) if isinstance(place, dict) for key in ("bits", "num_bits"))
    return next((number for number in numbers if type(number) is int and 0 < number <= 16), None)


def _parameters(infos: Mapping[str, TensorInfo], bits: int | None) -> int | None:
    """How many numbers the model has: a code is one, what scales the codes is none."""
    names = set(bitsandbytes_names(infos))
    packed = {
        *(name for name in infos if name.endswith((".qweight", ".weight_packed"))),
        *(name for name in infos if name.endswith("_blocks") and name.removesuffix("blocks") + "scales" in infos),
        *(name.removesuffix(".absmax") for name in infos if name.endswith(".absmax")),
    }
    if packed and bits is None:
        return None
    total = 0
    for name, info in infos.items():
        if name in packed:
            total += info.nbytes * 8 // (bits or 8)
        elif not _is_beside(name, infos) and (name not in names or name.endswith(".weight")):
            total += math.prod(info.shape)
    return total


def _is_beside(name: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor only says what codes mean."""
    module, _, last = name.rpartition(".")
    if name.endswith("_scales") and name.removesuffix("scales") + "blocks" in infos:
        return True
    if any(last in others and f"{module}.{codes}" in infos for codes, others in _BESIDE.items()):
        return True
    return name.endswith((*SCALES, *ACTIVATIONS))
