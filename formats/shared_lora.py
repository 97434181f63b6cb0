"""Shared LoRAs: `shared_lora.safetensors` and `shared_lora_config.json`, several adapters of one base over common subspaces.

Tensors, with `k` the number of a task from 1: `U.<module> (out, a)` and `V.<module> (b, in)` with orthonormal columns and rows, common
to all tasks, and `k.core.<module> (a, b)`, so that task k changes the module's weight by `U core V`; without a core it does not change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_convert.formats.checkpoint import TensorStore
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors
from adapt_convert.formats.source import SHARED_LORA_CONFIG, Part, Source

if TYPE_CHECKING:
    from torch import Tensor

    from adapt_convert.convert.delta import LowRankDelta

WEIGHTS = "shared_lora.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class Subspaces:
    """Of one module: `U (out, a)` and `V (b, in)`, orthonormal but for the rounding to their dtype."""

    U: Tensor
    V: Tensor


@dataclass
class SharedTask:
    """One adapter: its `cores (a, b)` by module."""

    name: str
    cores: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SharedLoraAdapter:
    """Several adapters over the `subspaces` of each module."""

    subspaces: dict[str, Subspaces]
    tasks: list[SharedTask]
    base_model: str = ""
    task_type: str | None = None

    @property
    def exact(self) -> dict[str, Tensor | LazyTensor]:
        """Nothing is held by value: it would be of one task alone."""
        return {}

    def tensors(self) -> dict[str, Tensor | LazyTensor]:
        tensors: dict[str, Tensor | LazyTensor] = {f"U.{module}": pair.U for module, pair in self.subspaces.items()}
        tensors |= {f"V.{module}": pair.V for module, pair in self.subspaces.items()}
        for number, task in enumerate(self.tasks, 1):
            tensors |= {f"{number}.core.{module}": core for module, core in task.cores.items()}
        return tensors

    def config(self) -> dict[str, Any]:
        return {
            "format": "shared-lora",
            "version": _VERSION,
            "base_model_name_or_path": self.base_model,
            "task_type": self.task_type,
            "r": max((max(pair.U.shape[1], pair.V.shape[0]) for pair in self.subspaces.values()), default=0),
            "tasks": [task.name for task in self.tasks],
        }

    def write(self, directory: Path) -> int:
        """Write config and weights; returns the size of the weights in bytes."""
        (directory / SHARED_LORA_CONFIG).write_text(json.dumps(self.config(), indent=1) + "\n", encoding="utf-8")
        return write_safetensors(directory / WEIGHTS, self.tensors(), {"format": "pt"})


@dataclass(frozen=True)
class SharedLora:
    """An opened directory: `names` of the tasks, and the `modules` that any of them changes. Tensors are read when asked for."""

    location: Location
    config: Mapping[str, Any]
    store: TensorStore
    names: tuple[str, ...]
    modules: tuple[str, ...]

    def subspaces(self, module: str) -> Subspaces:
        """Both in float32."""
        return Subspaces(self.store.read(f"U.{module}").float(), self.store.read(f"V.{module}").float())

    def core(self, number: int, module: str) -> Tensor | None:
        """The core of task `number`, from 1, float32; None where it leaves the module as it is."""
        key = f"{number}.core.{module}"
        return self.store.read(key).float() if key in self.store.infos else None

    def number(self, task: str | None) -> int:
        """The number of a task by its name or, as text, its number; without either that of the only one. Raises `AdaptError`."""
        if task is None and len(self.names) == 1:
            return 1
        for known in (self.names, tuple(str(number) for number in range(1, len(self.names) + 1))):
            if task in known:
                return known.index(task) + 1
        origin, names = self.location.origin, ", ".join(self.names)
        if task is not None:
            raise AdaptError(f"--task {task}: {origin} holds {names}")
        raise AdaptError(f"{origin}: holds several adapters, {names}; take one: adapt-convert delta BASE {origin} --task NAME")

    def source(self, task: str | None) -> Source:
        """One task as a LoRA of its own: factors `U core` and `V`."""
        number = self.number(task)
        parts = [self._part(number, module) for module in self.modules if f"{number}.core.{module}" in self.store.infos]
        return Source("lora", self.location, self.config, self.store, {part.name: part for part in parts}, {})

    def _part(self, number: int, module: str) -> Part:
        keys = f"U.{module}", f"V.{module}", f"{number}.core.{module}"
        left, right = self.store.infos[keys[0]], self.store.infos[keys[1]]

        def load() -> LowRankDelta:
            from adapt_convert.convert.delta import LowRankDelta  # imports torch, which headers do not need

            pair, core = self.subspaces(module), self.core(number, module)
            assert core is not None
            return LowRankDelta(pair.U @ core, pair.V)

        return Part(f"{module}.weight", keys, (left.shape[0], right.shape[1]), left.dtype, "low_rank", load, right.shape[0])


def open_shared_lora(location: Location) -> SharedLora:
    """Open a directory from headers. Raises `AdaptError` when config and tensors are missing or contradict each other."""
    config, path = read_json(location.directory / SHARED_LORA_CONFIG), location.directory / WEIGHTS
    if config.get("format") != "shared-lora" or config.get("version") != _VERSION:
        raise AdaptError(
            f"{location.directory / SHARED_LORA_CONFIG}: format {config.get('format')!r} version {config.get('version')!r}; "
            f"this adapt-convert reads shared-lora version {_VERSION}"
        )
    if not path.is_file():
        raise AdaptError(f"{location.origin}: has {SHARED_LORA_CONFIG} but no {WEIGHTS}")
    store, names = TensorStore([path]), config.get("tasks")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise AdaptError(f"{location.directory / SHARED_LORA_CONFIG}: tasks are {names!r}, expected a list of names")
    modules = tuple(key.removeprefix("U.") for key in store.infos if key.startswith("U."))
    opened = SharedLora(location, config, store, tuple(names), modules)
    for key in store.infos:
        _check(opened, key)
    return opened


def _check(opened: SharedLora, key: str) -> None:
    """Whether a tensor belongs to a shared LoRA and multiplies with those of its module."""
    infos, origin = opened.store.infos, opened.location.origin
    head, _, rest = key.partition(".")
    if len(infos[key].shape) != 2 or not infos[key].is_float:
        raise AdaptError(f"{origin}: {key} is {list(infos[key].shape)} of {infos[key].dtype}, expected a matrix of floating-point numbers")
    group, _, module = rest.partition(".") if head not in ("U", "V") else (head, "", rest)
    number = int(head) if head.isascii() and head.isdecimal() else 0
    if (head not in ("U", "V") and not (group == "core" and 1 <= number <= len(opened.names))) or not module:
        raise AdaptError(f"{origin}: {key} is no tensor of a shared LoRA of {len(opened.names)} tasks")
    for other in (f"U.{module}", f"V.{module}"):
        if other not in infos:
            raise AdaptError(f"{origin}: holds {key} but no {other}")
    core = infos[f"U.{module}"].shape[1], infos[f"V.{module}"].shape[0]
    if group == "core" and infos[key].shape != core:
        raise AdaptError(f"{origin}: {key} is {list(infos[key].shape)}, but its U and V take a core of {list(core)}")
