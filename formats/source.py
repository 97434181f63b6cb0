"""What a fine-tune is made of: named parts, whether it lies on the disk as a checkpoint or as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapt_convert.formats.checkpoint import Checkpoint, TensorStore
from adapt_convert.formats.location import Location

if TYPE_CHECKING:
    from torch import Tensor

    from adapt_convert.convert.delta import LowRankDelta

LORTA = "LORTA"  # the peft_type of this project's own method in an adapter_config.json
LATTE_CONFIG = "latte_config.json"
LATTE_WEIGHTS = "latte.safetensors"
SHARED_LORA_CONFIG = "shared_lora_config.json"
WITHOUT_MAGNITUDE = "captured_energy_without_magnitude"  # of a DoRA's change: what its factors alone hold


@dataclass(frozen=True)
class Part:
    """The change of one parameter, known from headers until `load` is called.

    `name` is the parameter's name in the model (`model.norm.weight`); `keys` are the tensors of the source that carry it;
    `shape` is the parameter's own shape, as stored. By `kind`, `load()` returns
    - `replace`: the new value, in its stored dtype and layout;
    - `add`: what is added to the base's value, float32;
    - `low_rank`: a `LowRankDelta` in the `(out, in)` layout (for an embedding: `(vocabulary, hidden)`).
    A part that is one stored tensor also has `blocks(elements)`: the same value piece by piece, as `TensorStore.blocks` gives it.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["replace", "add", "low_rank"]
    load: Callable[[], Tensor | LowRankDelta]
    rank: int | None = None
    blocks: Callable[[int], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class Source:
    """An opened fine-tune. `ignored` names the tensors of an adapter that change nothing, with the reason.

    `figures` are measured as parts are loaded, by parameter, and go into its row of the report.
    """

    kind: Literal["checkpoint", "lora", "lorta", "method"]
    location: Location
    config: Mapping[str, Any]
    store: TensorStore
    parts: Mapping[str, Part]
    ignored: Mapping[str, str]
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return self.location.origin


def whole_part(store: TensorStore, name: str, key: str) -> Part:
    """The parameter `name` replaced by the tensor `key`."""
    info = store.infos[key]
    return Part(
        name, (key,), info.shape, info.dtype, "replace", lambda: store.read(key), blocks=lambda elements: store.blocks(key, elements)
    )


def checkpoint_source(checkpoint: Checkpoint, names: Mapping[str, str]) -> Source:
    """A full fine-tune: every tensor is the new value of the parameter that `names` (key -> parameter) says it is."""

    parts = {names[key]: whole_part(checkpoint.store, names[key], key) for key in checkpoint.infos}
    return Source("checkpoint", checkpoint.location, checkpoint.config, checkpoint.store, parts, {})


def adapter_config_path(location: Location) -> Path | None:
    """The `adapter_config.json` that makes a directory (or the file in it) an adapter."""
    if location.file and not location.file.name.startswith("adapter_model"):
        return None
    path = location.directory / "adapter_config.json"
    return path if path.is_file() or path.is_symlink() else None  # reading it says of a link that nothing is there


def latte_config_path(location: Location) -> Path | None:
    """The `latte_config.json` that makes a directory a LatTE."""
    path = location.directory / LATTE_CONFIG
    return path if location.file is None and path.is_file() else None


def shared_lora_config_path(location: Location) -> Path | None:
    """The `shared_lora_config.json` that makes a directory a shared LoRA."""
    path = location.directory / SHARED_LORA_CONFIG
    return path if location.file is None and path.is_file() else None
