"""What a GGUF file says of itself, read within the bounds of the file.

The `gguf` package trusts the counts in a header: one that claims 2^60 entries keeps it busy for good. This reads what `lint` and
`push` ask of an adapter, and no tensor data. Layout (version 2 and 3, little-endian): magic, version u32, counts of tensors and
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
_LARGEST = 64 * 2**20  # bytes of a header: those of whole models, vocabulary included, stay below


@dataclass(frozen=True)
class GgufHeader:
    """`kind` is `general.type`, `adapter` is `adapter.type`, `alpha` is `adapter.lora.alpha` (0 without one: a scale of 1);
    `shapes` are those of the tensors, rows first."""

    kind: str
    adapter: str
    alpha: float
    shapes: Mapping[str, tuple[int, ...]]


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
        shapes = {}
        for _ in range(tensors):
            name, count = self.text(), self.take("I")[0]
            if name in shapes or count > 4:
                raise ValueError
            shapes[name] = self.take(f"{count}Q")[::-1]
            self.take("IQ")
        kind, adapter = (str(values.get(key, "")) for key in ("general.type", "adapter.type"))
        alpha = values.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, float):
            raise ValueError
        return GgufHeader(kind, adapter, alpha, shapes)

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
            for _ in range(length):
                self.text()
        else:  # an array of arrays is a KeyError: no file has one
            self.take(f"{length}{_SCALARS[inner]}")
        return None
