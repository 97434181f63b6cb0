"""A model on disk as a lazy mapping from names to tensors."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from adapt_convert.formats.dequantised import DequantisedFile
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.quantised import dequantise, refuse_quantised
from adapt_convert.formats.safetensors_file import SafetensorsFile, TensorInfo, byte_view

if TYPE_CHECKING:
    from torch import Tensor

    from adapt_convert.formats.pickle_file import PickleFile

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "diffusion_pytorch_model.safetensors.index.json")
_HASHED = 2**19  # elements at a time
_PIECE = 2**24  # bytes hashed at a time while another thread holds Python's lock: for each piece it has to be waited for
_SINGLE = (
    *("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"),
    "diffusion_pytorch_model.bin",
)
_USUAL = {*_INDEXES, *_SINGLE}
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Split:
    """A tensor of a file that appears as `parts`, consecutive pieces of it; `shape` is its own."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]


class TensorStore:
    """The tensors of one or more files: `infos` by name from the headers, `read` for one at a time.

    Every tensor is hashed when it is first read, or ahead of that (`hashing`), so that `content_hash` names the weights and not the
    files they lie in: the same model in other shards has the same hash. `prefixes` go before the names of the tensors of some files.
    """

    def __init__(self, files: list[Path], prefixes: Mapping[Path, str] | None = None) -> None:
        self.files = files
        self._owner: dict[str, tuple[SafetensorsFile | PickleFile | DequantisedFile, str]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.splits: dict[str, Split] = {}
        self._wholes: dict[str, str] = {}  # of the parts, the tensor of the file that holds each
        self.noise: Mapping[str, float] = {}  # of the tensors that were dequantised: the expected energy of what that added
        self._digests: dict[str, str] = {}
        self._read: list[str] = []  # a list, as several threads read
        for path in files:
            opened = _open(path)
            for stored, info in opened.infos.items():
                name = (prefixes or {}).get(path, "") + stored
                if name in self._owner:
                    raise AdaptError(f"{path}: {name!r} is also in {self._owner[name][0].path.name}; one of the two is stale")
                self._owner[name], self.infos[name] = (opened, stored), info

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        owner, stored = self._owner[name]
        tensor = owner.read(stored)
        self._read.append(name)
        if name not in self._digests:
            self._digests[name] = blake3(byte_view(tensor)).hexdigest()
        return tensor

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A tensor's elements in order, 1-D, in its stored dtype, at most `elements` at a time; a block may overwrite the one before.

        What is converted block by block stays in the processor's cache, and memory holds no second copy of the tensor.
        """
        self._read.append(name)
        digest = None if name in self._digests else blake3()
        owner, stored = self._owner[name]
        for block in owner.blocks(stored, elements):
            if digest:
                digest.update(byte_view(block))
            yield block
        if digest:
            self._digests[name] = digest.hexdigest()

    def split(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Let a tensor appear as `parts`, consecutive pieces of it of one `shape`, as if each lay in the file on its own.

        Raises `AdaptError` when one of them does.
        """
        twice = next((part for part in parts if part in self.infos), None)
        if twice:
            raise AdaptError(f"{self._owner[name][0].path}: holds {twice!r} in {name!r} and once more on its own; one of the two is stale")
        owner, stored = self._owner.pop(name)
        self.splits[name] = Split(tuple(parts), self.infos.pop(name).shape)
        owner.split(stored, parts, shape)
        for part in parts:
            self._owner[part], self.infos[part], self._wholes[part] = (owner, part), owner.infos[part], name

    def replace(self, names: Iterable[str], owner: DequantisedFile) -> None:
        """Let tensors appear as the ones that `owner` makes of them."""
        for name in names:
            del self._owner[name], self.infos[name]
        for name, info in owner.infos.items():
            self._owner[name], self.infos[name] = (owner, name), info
        self.noise = owner.noise

    def taker(self, name: str) -> Callable[[], Tensor]:
        """A function that reads a tensor as it is stored, whatever appears in its place later."""
        owner, stored = self._owner[name]
        return functools.partial(owner.read, stored)

    def rows_taker(self, name: str) -> Callable[[int], Tensor]:
        """The same for a stack: a function that reads its matrices by their numbers, each alone."""
        (owner, stored), shape = self._owner[name], self.infos[name].shape
        parts = [f"{stored}[{number}]" for number in range(shape[0])]
        owner.split(stored, parts, shape[1:])
        return lambda number: owner.read(parts[number])

    def stored_names(self, names: Iterable[str]) -> list[str]:
        """The tensors of the files that hold the named ones."""
        return list(dict.fromkeys(self._wholes.get(name, name) for name in names))

    def content_hash(self) -> str:
        """BLAKE3 over names, dtypes, shapes and contents of all tensors, in name order; reads what was not read yet.

        SHA-256 would take more of a conversion's time than reading and subtracting together.
        """
        import torch

        unread = [name for name in self.infos if name not in self._digests]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(self._hash, unread))
        total = blake3()
        for name, info in sorted(self.infos.items()):
            total.update(json.dumps([name, info.dtype, info.shape, self._digests[name]]).encode())
        return total.hexdigest()

    def _hash(self, name: str) -> None:
        for _ in self.blocks(name, _HASHED):
            pass

    def hash_ahead(self, name: str, buffer: memoryview, stop: threading.Event) -> None:
        """Hash a tensor that lies in a safetensors file as it is, in pieces of `buffer`, unless `stop` is set before it is done."""
        owner, stored = self._owner[name]
        if name in self._digests or not isinstance(owner, SafetensorsFile):
            return
        digest = blake3()
        for piece in owner.pieces(stored, buffer):
            if stop.is_set():
                return
            digest.update(piece)
        self._digests[name] = digest.hexdigest()

    @property
    def reads(self) -> int:
        """How many tensors were read so far, each as often as it was."""
        return len(self._read)

    def learn(self, digests: Mapping[str, str]) -> None:
        """Take the BLAKE3 of tensors from an earlier reading, so that `content_hash` need not read them."""
        self._digests |= digests

    def known(self, names: Iterable[str]) -> dict[str, str]:
        """The BLAKE3 of those of the tensors that were read."""
        return {name: self._digests[name] for name in names if name in self._digests}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


@contextmanager
def hashing(*stores: TensorStore) -> Iterator[None]:
    """Another thread hashes the tensors of the stores for as long as the block takes: meant for the import of torch, during which
    all other cores have nothing to do. It also has the system fetch from the disk what is read next."""
    stop = threading.Event()

    def work() -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for names in zip_longest(*(store.infos for store in stores)):
                for store, name in zip(stores, names, strict=True):
                    if name is not None and not stop.is_set():
                        store.hash_ahead(name, buffer, stop)
        except AdaptError:  # comes again where the tensor is read
            pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _open(path: Path) -> SafetensorsFile | PickleFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    from adapt_convert.formats.pickle_file import PickleFile  # needs torch even for its header

    return PickleFile(path)


class Checkpoint:
    """A base model or a full fine-tune: its tensors, and its `config.json` where there is one. Reads headers only.

    Of a diffusers pipeline it holds all components, as `unet.<parameter>`, `text_encoder.<parameter>` and so on.
    With `dequantised` its quantised weights appear in float32, where that is possible, and `quantisation` names their format; with
    `as_stored` they appear as they are. Without either a quantised checkpoint is refused.
    """

    kind = "checkpoint"

    def __init__(self, location: Location, dequantised: bool = False, as_stored: bool = False) -> None:
        refuse_unconsolidated(location)
        self.location = location
        self.origin = location.origin
        self.quantisation: str | None = None
        self.is_pipeline = location.file is None and (location.directory / PIPELINE).is_file()
        if dequantised and (gguf := gguf_file(location)):
            self._open_gguf(gguf)
            return
        config = location.directory / "config.json"
        self.config: dict[str, Any] = read_json(config) if config.is_file() or config.is_symlink() else {}
        _check_config(config, self.config)
        prefixes = _component_files(location) if self.is_pipeline else dict.fromkeys(weight_files(location), "")
        self.store = TensorStore(list(prefixes), prefixes)
        if not self.is_pipeline:
            _check_index(location, self.store)
        if not self.store.infos:
            raise AdaptError(f"{self.origin}: holds no tensors")
        if dequantised:
            self.quantisation = dequantise(self.origin, self.config, self.store)
        elif not as_stored:
            refuse_quantised(self.origin, self.config, self.store.infos)

    def _open_gguf(self, path: Path) -> None:
        from adapt_convert.formats.gguf_file import open_gguf

        model = open_gguf(path)
        self.config, self.quantisation = model.config, f"GGUF, {', '.join(model.types) or 'F32'}"
        self.store = TensorStore([])
        self.store.files = [path]
        self.store.replace([], model.weights)

    @functools.cached_property
    def is_diffusion(self) -> bool:
        """Whether this is a diffusers pipeline, a component of one, or an original single file."""
        return self.is_pipeline or "_class_name" in self.config or any(key.startswith("model.diffusion_model.") for key in self.infos)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.store.infos

    def read(self, name: str) -> Tensor:
        return self.store.read(name)

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        return self.store.blocks(name, elements)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """The fields that name the model have the types that everything after relies on."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is not None and not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise AdaptError(f"{path}: architectures is {architectures!r}, expected a list of class names")
    if model_type is not None and not isinstance(model_type, str):
        raise AdaptError(f"{path}: model_type is {model_type!r}, expected a name")


def gguf_file(location: Location) -> Path | None:
    """The GGUF file that a location means: the one named, or the only one of a directory without other weights."""
    if location.file:
        return location.file if location.file.suffix == ".gguf" else None
    if any((location.directory / name).is_file() for name in (*_INDEXES, *_SINGLE)):
        return None
    found = list(location.directory.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def weight_files(location: Location) -> list[Path]:
    """The files that hold the weights: the one named, those of an index, or a single file under its usual name."""
    if location.file:
        if location.file.name.endswith(".index.json"):
            return _indexed(location.file)
        if location.file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            hint = "; GGUF can be a base, and as a fine-tune its rounding would be converted" if location.file.suffix == ".gguf" else ""
            raise AdaptError(f"{location.origin}: is not a .safetensors or .bin file{hint}")
        return [location.file]
    for name in _INDEXES:
        if (location.directory / name).is_file():
            return _indexed(location.directory / name)
    for name in _SINGLE:
        if (location.directory / name).is_file():
            return [location.directory / name]
    broken = next((path for path in sorted(location.directory.iterdir()) if path.name in _USUAL and not path.exists()), None)
    if broken:
        raise AdaptError(f"{broken}: is a link to {os.readlink(broken)}, where nothing is; fetch it again")
    found = ", ".join(sorted(p.name for p in location.directory.iterdir())[:6]) or "nothing"
    raise AdaptError(f"{location.origin}: no model.safetensors, pytorch_model.bin or index of shards in it (found: {found})")


def _component_files(location: Location) -> dict[Path, str]:
    """The weight files of every component of a diffusers pipeline -> what goes before the names of their tensors."""
    files: dict[Path, str] = {}
    for component, kind in sorted(read_json(location.directory / PIPELINE).items()):
        directory = location.directory / component
        if component.startswith((".", "_")) or Path(component).name != component or not isinstance(kind, list) or not directory.is_dir():
            continue
        if any(path.suffix in (".safetensors", ".bin") for path in directory.iterdir()):
            files |= dict.fromkeys(weight_files(Location(str(directory), directory)), f"{component}.")
    return files


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise AdaptError(f"{index}: has no weight_map from tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise AdaptError(f"{index}: names the shard {name!r}, which is outside its own directory")
        try:
            found = (index.parent / name).is_file()
        except (OSError, ValueError):  # no file can be called so
            found = False
        if not found:
            raise AdaptError(f"{index}: the shard {name} is missing; fetch it again")
        files.append(index.parent / name)
    return files


def _check_index(location: Location, store: TensorStore) -> None:
    """Every tensor that an index promises is in the shards."""
    for name in _INDEXES:
        path = location.directory / name
        if location.file is None and path.is_file():
            absent = sorted(set(read_json(path).get("weight_map", {})) - set(store.infos))
            if absent:
                raise AdaptError(f"{path}: names {absent[0]!r}, which no shard holds ({len(absent)} such)")
            return


def refuse_unconsolidated(location: Location) -> None:
    """Training checkpoints in pieces: name the official tool that puts them together."""
    directory = location.directory
    if location.file:
        return
    if any(directory.glob("pytorch_model_fsdp_*")) or any(directory.glob("*.distcp")):
        raise AdaptError(f"{location.origin}: is an FSDP checkpoint in shards; run `accelerate merge-weights` on it first")
    in_pieces = any(directory.glob("**/*_optim_states.pt")) or (directory / "zero_to_fp32.py").is_file()
    if in_pieces and not any((directory / name).is_file() for name in (*_INDEXES, *_SINGLE)):
        raise AdaptError(f"{location.origin}: is a DeepSpeed ZeRO checkpoint; run its own zero_to_fp32.py first")
