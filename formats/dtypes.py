"""Element types by name: the names of safetensors headers (`BF16`) and torch's own (`bfloat16`).

Nothing here, and nothing that reads headers alone, imports torch before a tensor is made: that takes longer than the rest of `inspect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What is read and written, in the order in which the `safetensors` library lays tensors out: widest first, so that each is aligned.
TORCH_NAMES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight is trained and stored in, unquantised
_FILE_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}
_BITS = {
    **{"U64": 64, "I64": 64, "F64": 64, "F32": 32, "U32": 32, "I32": 32, "BF16": 16, "F16": 16, "U16": 16, "I16": 16},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8},
    # Stored by other writers and never read here: their size still has to add up.
    **{"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64},
}


def bits_of(name: str) -> int | None:
    """Bits per element of a type by either name; None for one that no header should have."""
    return _BITS.get(_FILE_NAMES.get(name, name))


def torch_dtype(name: str) -> torch.dtype:
    """Torch's type for a name of either kind. Raises `KeyError` for one that torch cannot hold."""
    import torch

    dtype: torch.dtype = getattr(torch, name if name in _FILE_NAMES else TORCH_NAMES[name])
    return dtype


def file_name(dtype: torch.dtype) -> str | None:
    """The name in a safetensors header of torch's type; None for one that no file holds."""
    return _FILE_NAMES.get(str(dtype).removeprefix("torch."))
