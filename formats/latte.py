"""LatTE directories: `latte.safetensors` and `latte_config.json`, holding only what the adapter adds.

Tensors, with `k` the number of a task from 1 and `i` that of a segment from 0 (docs/formats.md has the byte-level description):
`segment.i.Q (d, R_i)` float32 with orthonormal columns; `k.reader.<module> (out, R_i)`, the effective delta times Q;
`k.writer.<module> (R_i, in)`, Q^T times the delta; `k.bias.<module> (out,)` float32, in place of the base's bias;
`k.exact.<parameter>`, a parameter's new value. A LatTE of the score construction has no segments and, by attention module,
`k.score.<module>.{q,k,v}_{A,B}`: the low-rank changes of q, k and v, `A (r, in)` and `B (out, r)`. Blocks that depend on the base
alone are derived when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.formats.checkpoint import TensorStore
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.safetensors_file import LazyTensor, byte_view, write_safetensors
from adapt_convert.formats.source import LATTE_CONFIG, LATTE_WEIGHTS

_VERSION = 1
_ORTHONORMAL = 1e-3  # how far Q^T Q may be from the identity
_SAMPLE = 4096  # entries of a matrix that its fingerprint covers
_FINGERPRINT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Segment:
    """A run of layers `start:stop` that shares one basis `Q (d, R)`, float32."""

    start: int
    stop: int
    Q: Tensor

    @property
    def rank(self) -> int:
        return self.Q.shape[1]

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)


def segment_of(segments: Iterable[Segment], layer: int) -> Segment:
    """The segment that a layer belongs to."""
    return next(segment for segment in segments if layer in segment.layers)


@dataclass
class LatteTask:
    """One adapter: `readers` module -> `(out, R)`, `writers` module -> `(R, in)`, `biases` module -> `(out,)`, `exact` by parameter.

    `scores` holds the factors of the score construction by `<module>.{q,k,v}_{A,B}`.
    """

    name: str
    readers: dict[str, Tensor] = field(default_factory=dict)
    writers: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Tensor | LazyTensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """What it holds, by the word for it in the names of its tensors."""
        return {"reader": self.readers, "writer": self.writers, "bias": self.biases, "exact": self.exact, "score": self.scores}

    def tensors(self, number: int) -> dict[str, Tensor | LazyTensor]:
        return {f"{number}.{group}.{name}": value for group, held in self.groups.items() for name, value in held.items()}


@dataclass
class LatteAdapter:
    """A LatTE of one or more tasks over common bases; `fingerprints` tells the base (module -> dtype -> hash)."""

    model_type: str
    segments: list[Segment]
    tasks: list[LatteTask]
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    construction: str = "residual"
    base_model: str = ""
    task_type: str | None = None
    details: dict[str, Any] = field(default_factory=dict)  # what the report says of it; not written here

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        if self.segments:
            return self.segments[0].Q.shape[0]
        return next(value.shape[1] for name, value in self.tasks[0].scores.items() if name.endswith("_A"))

    @property
    def exact(self) -> dict[str, Tensor | LazyTensor]:
        """The parameters that are held by value, of all tasks."""
        return {f"{n}.{name}": value for n, task in enumerate(self.tasks, 1) for name, value in task.exact.items()}

    def tensors(self) -> dict[str, Tensor | LazyTensor]:
        tensors: dict[str, Tensor | LazyTensor] = {f"segment.{i}.Q": s.Q for i, s in enumerate(self.segments)}
        for number, task in enumerate(self.tasks, 1):
            tensors |= task.tensors(number)
        return tensors

    def config(self) -> dict[str, Any]:
        return {
            "format": "latte",
            "version": _VERSION,
            "construction": self.construction,
            "model_type": self.model_type,
            "base_model_name_or_path": self.base_model,
            "task_type": self.task_type,
            "hidden_size": self.width,
            "segments": [[s.start, s.stop, s.rank] for s in self.segments],
            "tasks": [task.name for task in self.tasks],
            "fingerprints": self.fingerprints,
        }

    def parameters(self) -> int:
        """How many numbers the adapter adds."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors().values())

    def write(self, directory: Path) -> int:
        """Write config and weights; returns the size of the weights in bytes."""
        (directory / LATTE_CONFIG).write_text(json.dumps(self.config(), indent=1) + "\n", encoding="utf-8")
        return write_safetensors(directory / LATTE_WEIGHTS, self.tensors(), {"format": "pt"})


def fingerprint(weight: Tensor, stored: torch.dtype) -> dict[str, str]:
    """Hashes of a strided sample of a base matrix, by dtype: as it is stored, and as it is when loaded in half precision."""
    dtypes = {name: d for name, d in _FINGERPRINT_DTYPES.items() if d != torch.float32 or stored in (torch.float32, torch.float64)}
    return {name: _hash(weight, dtype) for name, dtype in dtypes.items()} | {"stored": str(stored).removeprefix("torch.")}


def _hash(weight: Tensor, dtype: torch.dtype) -> str:
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", dtype).contiguous()
    return hashlib.sha256(byte_view(sample)).hexdigest()[:16]


def matches_fingerprint(weight: Tensor, hashes: Mapping[str, str]) -> bool:
    """Whether a live parameter (in its own layout) is the matrix that was fingerprinted, in whatever dtype it was loaded."""
    own = str(weight.dtype).removeprefix("torch.")
    name = own if own in hashes and own != "stored" else hashes.get("stored", "float32")
    dtype = _FINGERPRINT_DTYPES.get(name, torch.float32)
    return hashes.get(str(dtype).removeprefix("torch.")) == _hash(weight, dtype)


def read_latte(location: Location) -> LatteAdapter:
    """Read a LatTE directory. Raises `AdaptError` when config and tensors are missing or contradict each other."""
    config = read_json(location.directory / LATTE_CONFIG)
    path = location.directory / LATTE_WEIGHTS
    if config.get("format") != "latte" or config.get("version") != _VERSION:
        raise AdaptError(
            f"{location.directory / LATTE_CONFIG}: format {config.get('format')!r} version {config.get('version')!r}; "
            f"this adapt-convert reads latte version {_VERSION}"
        )
    if not path.is_file():
        raise AdaptError(f"{location.origin}: has {LATTE_CONFIG} but no {LATTE_WEIGHTS}")
    store = TensorStore([path])
    try:
        adapter = LatteAdapter(
            model_type=str(config["model_type"]),
            segments=[_segment(store, i, *row) for i, row in enumerate(config["segments"])],
            tasks=[LatteTask(name) for name in _names(config["tasks"])],
            fingerprints={m: dict(hashes) for m, hashes in config["fingerprints"].items()},
            construction=str(config["construction"]),
            base_model=str(config.get("base_model_name_or_path", "")),
            task_type=config.get("task_type"),
        )
        _check_segments(adapter, int(config["hidden_size"]))
        for key in store.infos:
            _place(adapter, store, key)
        _check_scores(adapter, int(config["hidden_size"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AdaptError(f"{location.origin}: is not a readable LatTE adapter: {error}") from None
    return adapter


def _names(tasks: Any) -> list[str]:
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        raise ValueError(f"tasks are {tasks!r}, expected a list of names")
    return tasks


def _segment(store: TensorStore, number: int, start: Any, stop: Any, rank: Any) -> Segment:
    name = f"segment.{number}.Q"
    if name not in store.infos:
        raise ValueError(f"{name} is missing")
    if not (type(start) is type(stop) is int and 0 <= start < stop):
        raise ValueError(f"segment {number} covers layers {start!r} to {stop!r}")
    Q = store.read(name).float()
    if Q.ndim != 2 or Q.shape[1] != rank or not 1 <= Q.shape[1] <= Q.shape[0]:
        raise ValueError(f"{name} has shape {list(Q.shape)}, the config says rank {rank!r}")
    if not (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < _ORTHONORMAL:  # so that NaN is refused too
        raise ValueError(f"the columns of {name} are not orthonormal")
    return Segment(start, stop, Q)


def _check_scores(adapter: LatteAdapter, width: int) -> None:
    """Whether every change of q, k or v has both of its factors, and only in the construction that has them."""
    scores = adapter.tasks[0].scores
    if any(task.scores for task in adapter.tasks) != (adapter.construction == "score"):
        raise ValueError(f"its tensors do not go with the construction {adapter.construction!r}")
    for name in scores:
        head, letter = name[:-1], name[-1]
        other = f"{head}{'B' if letter == 'A' else 'A'}"
        if other not in scores or scores[f"{head}A"].shape[0] != scores[f"{head}B"].shape[1]:
            raise ValueError(f"1.score.{name} does not multiply with 1.score.{other}")
    if any(value.shape[1] != width for name, value in scores.items() if name.endswith("_A")):
        raise ValueError(f"its scores do not read the {width} channels of hidden_size")


def _check_segments(adapter: LatteAdapter, width: int) -> None:
    if adapter.construction not in ("residual", "score"):
        raise ValueError(f"the construction {adapter.construction!r} is not known")
    if not adapter.tasks or bool(adapter.segments) != (adapter.construction == "residual"):
        raise ValueError("it has no task, or segments that do not go with its construction")
    if adapter.construction == "score" and len(adapter.tasks) > 1:
        raise ValueError("the score construction holds one task")
    stops = [0, *(s.stop for s in adapter.segments)]
    if any(s.start != before for s, before in zip(adapter.segments, stops, strict=False)):
        raise ValueError("its segments do not follow each other")
    for number, segment in enumerate(adapter.segments):
        if segment.Q.shape[0] != width:
            raise ValueError(f"segment.{number}.Q has {segment.Q.shape[0]} rows, the config says hidden_size {width}")


def _place(adapter: LatteAdapter, store: TensorStore, key: str) -> None:
    head, _, rest = key.partition(".")
    group, _, name = rest.partition(".")
    if head == "segment":
        if not (group.isdecimal() and int(group) < len(adapter.segments) and name == "Q"):
            raise ValueError(f"{key!r} is of no segment in the config")
        return
    number = int(head) if head.isdecimal() else 0
    if number > len(adapter.tasks):
        raise ValueError(f"{key!r} is of task {number}, the config names {len(adapter.tasks)}")
    held = adapter.tasks[number - 1].groups if number else {}
    if group not in held or not name:
        raise ValueError(f"{key!r} is no tensor of a LatTE")
    value = store.read(key)
    if group in ("reader", "writer", "score") and (value.ndim != 2 or not value.is_floating_point()):
        raise ValueError(f"{key} is {list(value.shape)} of {value.dtype}, expected a matrix of floating-point numbers")
    held[group][name] = value
