"""Lazy reading and streamed writing of safetensors files.

The `safetensors` library maps a whole file into memory, so the resident size of a process that reads a model grows to the size of
the model; and it opens no file that holds a dtype it does not know. Here a header is parsed once and checked against the file,
a tensor is one `pread` into its own buffer, and a file is written one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adapt_convert.formats.dtypes import FLOATS, TORCH_NAMES, bits_of, file_name, torch_dtype
from adapt_convert.formats.errors import AdaptError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER = 64 * 2**20  # bytes; the headers of the largest public models stay below 20 MB

_MAX_DIMENSIONS = 64  # as many as torch takes


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: `dtype` is the safetensors name, `nbytes` its size in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


class SafetensorsFile:
    """One open safetensors file: `infos` from the header, `read` for one tensor at a time.

    Raises `AdaptError` when the header is not JSON, is larger than `MAX_HEADER`, or disagrees with itself or with the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.metadata, self.infos, self._starts = self._parse_header(file)
        except OSError as error:
            raise AdaptError(f"{path}: cannot be read: {error.strerror}") from None

    def _parse_header(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise self._broken(f"is {size} bytes long, not a safetensors file")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise self._broken(f"claims a header of {length} bytes; more than {MAX_HEADER} is refused")
        if length > size - 8:
            raise self._broken(f"claims a header of {length} bytes but is {size} bytes long: truncated, or not safetensors")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=_checked_object)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"has a header that is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._broken("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._broken("has a __metadata__ entry that is not a JSON object of strings")
        return metadata, *self._check_entries(header, data_start=8 + length, size=size)

    def _check_entries(self, header: dict[str, Any], data_start: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            info, begin, end = self._entry(name, entry)
            infos[name] = info
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise self._broken(f"has a gap or an overlap before {name!r} (offset {begin}, expected {position})")
            position = end
        if data_start + position != size:
            raise self._broken(f"should be {data_start + position} bytes long but is {size}: truncated or damaged; fetch it again")
        return infos, {name: data_start + begin for begin, _, name in spans}

    def _entry(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            well_formed = (
                isinstance(dtype, str) and isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            )
        except (TypeError, KeyError, ValueError):
            well_formed = False
        if not well_formed:
            raise self._broken(f"has a malformed header entry for {name!r}")
        # Torch counts in int64, and zeros must not hide what it cannot count.
        if len(shape) > _MAX_DIMENSIONS or math.prod(n or 1 for n in shape[:_MAX_DIMENSIONS]) >= 2**60:
            raise self._broken(f"gives {name!r} {len(shape)} dimensions of a size that no tensor has")
        bits = bits_of(dtype)
        if bits is None:
            raise self._broken(f"stores {name!r} in the unknown dtype {dtype[:40]!r}")
        if (end - begin) * 8 != math.prod(shape) * bits:
            raise self._broken(f"gives {name!r} {end - begin} bytes, which does not fit shape {shape} of {dtype}")
        return TensorInfo(name, tuple(shape), dtype, end - begin), begin, end

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Safe to call from several threads."""
        import torch

        info = self._readable(name)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        with self._opened(name) as file:
            self._fill(file, byte_view(buffer), name)
        return buffer.view(torch_dtype(info.dtype)).reshape(info.shape)

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A tensor's elements in the order of the file, 1-D, at most `elements` at a time; each block overwrites the one before."""
        import torch

        info = self._readable(name)
        dtype = torch_dtype(info.dtype)
        buffer = torch.empty(min(info.nbytes, elements * dtype.itemsize), dtype=torch.uint8)
        with self._opened(name) as file:
            for start in range(0, info.nbytes, max(1, len(buffer))):
                block = buffer[: info.nbytes - start]
                self._fill(file, byte_view(block), name)
                yield block.view(dtype)

    def pieces(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """A tensor's bytes in the order of the file, each piece in `buffer`, over the one before; torch is not needed for it."""
        info = self._readable(name)
        with self._opened(name) as file:
            for start in range(0, info.nbytes, len(buffer)):
                piece = buffer[: info.nbytes - start]
                self._fill(file, piece, name)
                yield piece

    def split(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Let a tensor appear as `parts`, consecutive pieces of it of one `shape`; nothing is read."""
        info, start = self.infos.pop(name), self._starts.pop(name)
        size = info.nbytes // len(parts)
        for number, part in enumerate(parts):
            self.infos[part] = TensorInfo(part, shape, info.dtype, size)
            self._starts[part] = start + number * size

    def _readable(self, name: str) -> TensorInfo:
        info = self.infos[name]
        if info.dtype not in TORCH_NAMES:
            raise self._broken(f"stores {name!r} as {info.dtype}, a quantised format; dequantise the model first")
        return info

    def _opened(self, name: str) -> FileIO:
        """The file, at the start of a tensor, which the system is told to fetch."""
        try:
            file = FileIO(self.path)
            file.seek(self._starts[name])
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), self._starts[name], self.infos[name].nbytes, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise AdaptError(f"{self.path}: cannot be read: {error.strerror}") from None
        return file

    def _fill(self, file: FileIO, buffer: memoryview, name: str) -> None:
        done = 0
        try:
            while done < len(buffer):  # one call reads at most 2 GiB
                count = file.readinto(buffer[done:])
                if not count:
                    raise self._broken(f"ends inside {name!r}: it was cut short while being read")
                done += count
        except OSError as error:
            raise AdaptError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _broken(self, what: str) -> AdaptError:
        return AdaptError(f"{self.path}: {what}")


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, and without names that UTF-8 cannot write back."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    for name in result:
        name.encode()
    return result


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is written: `shape`, `dtype` and a function that returns it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _layout(tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes, int]:
    """The names in the order of the file, the encoded header, and how many bytes of data follow it."""
    dtypes = {name: str(file_name(tensor.dtype)) for name, tensor in tensors.items()}
    order = list(TORCH_NAMES)
    names = sorted(tensors, key=lambda name: (order.index(dtypes[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of eight
    return names, encoded, position


def safetensors_size(tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> int:
    """The size in bytes that `write_safetensors` would give the file; of the tensors only shapes and dtypes are looked at."""
    _, encoded, data = _layout(tensors, metadata)
    return 8 + len(encoded) + data


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> int:
    """Write one file, holding one lazy tensor at a time; returns its size in bytes.

    The order is that of the `safetensors` library (by dtype, then by name), so equal content gives equal bytes.
    """
    names, encoded, data = _layout(tensors, metadata)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = tensors[name]
            value = tensor.load() if isinstance(tensor, LazyTensor) else tensor
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor.dtype} {tensor.shape}, got {value.dtype} {tuple(value.shape)}")
            file.write(byte_view(value.detach().cpu().contiguous()))
    return 8 + len(encoded) + data
