"""What a GGUF file says of itself, read within the bounds of the file.

The `gguf` package trusts the counts in a header: one that claims 2^60 entries keeps it busy for good. This reads what `inspect`, `lint`
and `push` ask of a file, and no tensor data. Layout (version 2 and 3, little-endian): magic, version u32, counts of tensors and
keys u64; for each key its name, a type u32 and the value; for each tensor its name, dimensions u32, sizes u64 (fastest first), type
u32, offset u64. A text is its length u64 and its bytes; an array its type u32, its length u64 and its values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location
from adapt_convert.formats.profiles import GGUF_WEIGHTS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# The types of tensors by their numbers (ggml.h).
TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
_LARGEST = 64 * 2**20  # bytes of a header: those of whole models, vocabulary included, stay below


@dataclass(frozen=True)
class GgufHeader:
    """`kind` is `general.type`, `adapter` is `adapter.type`, `alpha` is `adapter.lora.alpha` (0 without one: a scale of 1),
    `architecture` is `general.architecture`, `layers` its `block_count`; `shapes` and `types` are those of the tensors, rows first."""

    kind: str
    adapter: str
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    architecture: str
    layers: int | None


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises `AdaptError` for a file that is damaged or no GGUF file."""
    try:
        with open(path, "rb") as file:
            return _Parser(file.read(_LARGEST)).header()
    except OSError as error:
        raise AdaptError(f"{path}: cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, KeyError):
        raise AdaptError(f"{path}: is damaged or not a GGUF file; write it again") from None


def gguf_adapter(location: Location) -> tuple[Path, GgufHeader] | None:
    """The GGUF adapter that a location names or holds. Raises `AdaptError` for a damaged file."""
    path = location.file or location.directory / GGUF_WEIGHTS
    if path.suffix != ".gguf" or not path.is_file():
        return None
    header = read_gguf_header(path)
    return (path, header) if header.kind == "adapter" else None


class _Parser:
    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def header(self) -> GgufHeader:
        magic, version, tensors, keys = self.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError
        values = {}
        for _ in range(keys):
            key, kind = self.text(), self.take("I")[0]
            values[key] = self.value(kind)
        shapes, types = {}, {}
        for _ in range(tensors):
            name, count = self.text(), self.take("I")[0]
            if name in shapes or count > 4:
                raise ValueError
            shapes[name] = self.take(f"{count}Q")[::-1]
            number = self.take("IQ")[0]
            types[name] = TYPES.get(number, f"type {number}")
        kind, adapter = (str(values.get(key, "")) for key in ("general.type", "adapter.type"))
        alpha = values.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, float):
            raise ValueError
        architecture = str(values.get("general.architecture", ""))
        layers = values.get(f"{architecture}.block_count")
        return GgufHeader(kind, adapter, alpha, shapes, types, architecture, layers if type(layers) is int else None)

    def take(self, layout: str) -> tuple[Any, ...]:
        """`struct.error` beyond the end of the file."""
        values = struct.unpack_from(f"<{layout}", self.content, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.content):
            raise ValueError
        return str(self.take(f"{length}s")[0], "utf-8")

    def value(self, kind: int) -> object:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        inner, length = self.take("IQ")
        if length > len(self.content):
            raise ValueError
        if inner == _TEXT:
            for _ in range(length):  # a vocabulary, of which nothing is wanted
                (size,) = self.take("Q")
                if size > len(self.content):
                    raise ValueError
                self.position += size
            self.take("0s")  # not beyond the end
        else:  # an array of arrays is a KeyError: no file has one
            self.take(f"{length}{_SCALARS[inner]}")
        return None
