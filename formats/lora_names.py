"""The names of tensors in LoRA files: which kind of tensor a key is, under whatever name its writer knows it."""

from __future__ import annotations

import re
from pathlib import Path

from adapt_convert.formats.location import Location
from adapt_convert.formats.safetensors_file import SafetensorsFile

_PEFT = "base_model.model."  # PEFT's own files come with a config
DIFFUSERS_FILE, KOHYA_FILE = FILES = ("pytorch_lora_weights.safetensors", "lora.safetensors")
_SLOTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    **{name: name for name in ("alpha", "diff", "diff_b", "dora_scale")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_SLOT = re.compile(rf"^(?P<name>.+?)\.(?P<slot>{'|'.join(re.escape(slot) for slot in _SLOTS)})$")
_COMMON_WORDS = ("alpha", "diff", "diff_b")  # checkpoints have such names too
OTHER_METHODS = re.compile(r"\.(oft_blocks|oft_diag|a1\.weight|a2\.weight|on_input|w_norm|b_norm|tlora_\w+)$")

_OLD_SLOT = re.compile(r"^(?P<name>.+?)[._](?:lora|lora_linear_layer)\.(?P<half>down|up)\.weight$")
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def plain_name(key: str) -> tuple[str, str] | None:
    """Module and half (`down`, `up`) of a key as diffusers wrote it before PEFT: `...attn1.processor.to_q_lora.down.weight`."""
    match = _OLD_SLOT.match(key)
    if match is None:
        return None
    name = match["name"].replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if parent.endswith("self_attn") and last in _OLD_ATTENTION:
        name = f"{parent}.{_OLD_ATTENTION[last]}"
    elif last == "to_out":
        name += ".0"
    return name, match["half"]


def lora_file(location: Location) -> Path | None:
    """The LoRA file that a location names or holds; told from a checkpoint by the names of its tensors."""
    path = location.file or next((path for path in (location.directory / name for name in FILES) if path.is_file()), None)
    if path is None or path.suffix != ".safetensors":
        return None
    names = SafetensorsFile(path).infos
    return path if any(_is_telling(name) for name in names) else None


def _is_telling(key: str) -> bool:
    """Whether no checkpoint would have a tensor of this name."""
    if key.startswith(_PEFT):
        return False
    slot = slot_of(key)
    return slot[1] not in _COMMON_WORDS if slot else key.startswith(("lora_", "lycoris_")) and OTHER_METHODS.search(key) is not None


def slot_of(key: str) -> tuple[str, str] | None:
    """The module's spelling and the kind of tensor, or None for what no LoRA file has."""
    match = _SLOT.match(key)
    return (match["name"], _SLOTS[match["slot"]]) if match else plain_name(key)
