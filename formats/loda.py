"""LoDA directories: one small nonlinear map for every adapted matrix, and what stands in for the base's weight where that is replaced.

`adapter_model.safetensors` has PEFT's names for the linear factors, `<module>.lora_A.weight (r, in)` and `<module>.lora_B.weight
(out, r)`, so that a LoDA without a nonlinear part reads like a LoRA. Its own are `<module>.loda_f1_in.weight` and
`<module>.loda_f1_out.weight (r, r)`, `<module>.loda_f2.weight (out,)`, and for a replaced weight `<module>.loda_base_A.weight (K, in)`
with `<module>.loda_base_B.weight (out, K)`, or `<module>.loda_keep`, one bit for each entry. docs/formats.md has the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.loda_config import EPSILON, PEFT_TYPE, SLOPE, VERSION, check_loda_config
from adapt_convert.formats.peft import CONFIG, PREFIX, WEIGHTS
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors

_A, _B, KEEP = "lora_A.weight", "lora_B.weight", "loda_keep"
_F1_IN, _F1_OUT, _F2 = "loda_f1_in.weight", "loda_f1_out.weight", "loda_f2.weight"
_BASE_A, _BASE_B = "loda_base_A.weight", "loda_base_B.weight"
_PAIRS = ((_A, _B), (_F1_IN, _F1_OUT), (_BASE_A, _BASE_B))
_OWN = (*(name for pair in _PAIRS for name in pair), _F2, KEEP)


@dataclass(frozen=True)
class LodaMatrix:
    """The map `f(x) = B (z + f1(z)) + f2(B f1(z))`, `z = A x`, of one matrix, and what replaces the base's weight under it.

    `A (r, in)`, `B (out, r)`; `f1 = (W_in, W_out)`, both `(r, r)`, None for no f1; `f2 (out,)`, None for no f2, which needs an f1.
    `base` is a low-rank weight in place of the base's, `keep (out, in)`, boolean, the entries of the base's weight that stay; at most
    one of the two is given. Raises `ValueError` for shapes that do not go together.
    """

    A: Tensor
    B: Tensor
    f1: tuple[Tensor, Tensor] | None = None
    f2: Tensor | None = None
    base: LowRankDelta | None = None
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or self.rank == 0:
            raise ValueError(f"A {list(self.A.shape)} and B {list(self.B.shape)} do not multiply")
        if self.f1 is not None and any(weight.shape != (self.rank, self.rank) for weight in self.f1):
            raise ValueError(f"f1 is {[list(weight.shape) for weight in self.f1]}, expected two of {[self.rank, self.rank]}")
        if self.f2 is not None and (self.f1 is None or self.f2.shape != self.shape[:1]):
            raise ValueError(f"f2 is {list(self.f2.shape)}, expected [{self.shape[0]}] beside an f1")
        if self.base is not None and self.keep is not None:
            raise ValueError("both a low-rank and a sparse weight in place of the base's")
        stand_in = self.base if self.base is not None else self.keep
        if stand_in is not None and tuple(stand_in.shape) != self.shape:
            raise ValueError(f"the weight in place of the base's is {list(stand_in.shape)}, the adapter {list(self.shape)}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, device: torch.device) -> LodaMatrix:
        """The map on another device; what replaces the weight stays where it is."""
        f1 = (self.f1[0].to(device), self.f1[1].to(device)) if self.f1 is not None else None
        return replace(self, A=self.A.to(device), B=self.B.to(device), f1=f1, f2=self.f2.to(device) if self.f2 is not None else None)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is stored, by the last part of its name."""
        held = {_A: self.A, _B: self.B}
        if self.f1 is not None:
            held |= {_F1_IN: self.f1[0], _F1_OUT: self.f1[1]}
        if self.f2 is not None:
            held[_F2] = self.f2
        if self.base is not None:
            held |= {_BASE_A: self.base.A, _BASE_B: self.base.B}
        rounded = {name: tensor.to("cpu", dtype) for name, tensor in held.items()}
        return rounded if self.keep is None else rounded | {KEEP: pack_bits(self.keep)}

    def rounded(self, dtype: torch.dtype) -> LodaMatrix:
        """As it will be read back: rounded to the dtype on disk, in float32 on the CPU."""
        return _matrix({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in self.tensors(dtype).items()})


@dataclass
class LodaAdapter:
    """A LoDA to be written or as read: its matrices by module (float32), `exact` parameters by name; `dtype` is that on disk.

    `base_rank` (K) and `keep` (share of entries) say how weights were replaced, None where none are; `details` go into the report.
    """

    variant: str
    matrices: dict[str, LodaMatrix]
    dtype: torch.dtype
    exact: dict[str, Tensor | LazyTensor] = field(default_factory=dict)
    base_rank: int | None = None
    keep: float | None = None
    base_model: str = ""
    task_type: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "loda"

    def tensors(self) -> dict[str, Tensor | LazyTensor]:
        tensors: dict[str, Tensor | LazyTensor] = {}
        for module, matrix in self.matrices.items():
            tensors |= {f"{PREFIX}{module}.{name}": value for name, value in matrix.tensors(self.dtype).items()}
        return tensors | {PREFIX + name: value for name, value in self.exact.items()}

    def config(self) -> dict[str, Any]:
        rank = max(matrix.rank for matrix in self.matrices.values())
        return {
            "peft_type": PEFT_TYPE,
            "version": VERSION,
            "variant": self.variant,
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "bias": "none",
            "negative_slope": SLOPE,
            "layer_norm_eps": EPSILON,
            "base_rank": self.base_rank,
            "keep": self.keep,
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in self.matrices}),
        }

    def write(self, directory: Path) -> int:
        """Write config and weights; returns the size of the weights in bytes."""
        (directory / CONFIG).write_text(json.dumps(self.config(), indent=1) + "\n", encoding="utf-8")
        return write_safetensors(directory / WEIGHTS, self.tensors(), {"format": "pt"})


def stored_shapes(shape: tuple[int, int], rank: int, plus: bool, base_rank: int | None, masked: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of what is stored for a matrix of `shape (out, in)`, by the last part of their names: with `plus` also f1 and f2,
    with a `base_rank` a low-rank weight, and if `masked` one bit for each entry in `KEEP`."""
    rows, columns = shape
    held: dict[str, tuple[int, ...]] = {_A: (rank, columns), _B: (rows, rank)}
    if plus:
        held |= {_F1_IN: (rank, rank), _F1_OUT: (rank, rank), _F2: (rows,)}
    if base_rank is not None:
        held |= {_BASE_A: (base_rank, columns), _BASE_B: (rows, base_rank)}
    return held | {KEEP: ((rows * columns + 7) // 8,)} if masked else held


def pack_bits(keep: Tensor) -> Tensor:
    """A boolean matrix as `uint8 (ceil(n / 8),)`: entry i, counted row by row, is bit `i % 8` of byte `i // 8`."""
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The boolean matrix again. Raises `ValueError` for another number of bytes or bits set beyond the matrix."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(f"{KEEP} is {list(packed.shape)} of {packed.dtype}, expected [{(count + 7) // 8}] of torch.uint8")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError(f"{KEEP} has bits beyond the {count} entries of the matrix")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)


def read_loda(location: Location) -> LodaAdapter:
    """Read a LoDA directory; parameters stored exactly stay on the disk until they are asked for.

    Raises `AdaptError` when config and tensors are missing or contradict each other.
    """
    config = read_json(location.directory / CONFIG)
    check_loda_config(location.directory / CONFIG, config)
    store = TensorStore(weight_files(location))
    by_module, exact = _sorted_keys(store)
    if not by_module:
        raise AdaptError(f"{location.origin}: is not a readable LoDA adapter: it adapts no matrix")
    matrices = {}
    for module, keys in by_module.items():
        try:
            matrices[module] = _matrix({name: _read(store, key, name) for name, key in keys.items()})
        except ValueError as error:
            raise AdaptError(f"{location.origin}: is not a readable LoDA adapter: {module}: {error}") from None
    dtype = store.read(by_module[next(iter(by_module))][_A]).dtype
    return LodaAdapter(
        variant=config["variant"],
        matrices=matrices,
        dtype=dtype,
        exact=exact,
        base_rank=config.get("base_rank"),
        keep=config.get("keep"),
        base_model=str(config.get("base_model_name_or_path", "")),
        task_type=config.get("task_type"),
    )


def _sorted_keys(store: TensorStore) -> tuple[dict[str, dict[str, str]], dict[str, Tensor | LazyTensor]]:
    """The keys of each adapted module by the last part of their names, and every other parameter."""
    by_module: dict[str, dict[str, str]] = {}
    exact: dict[str, Tensor | LazyTensor] = {}
    for key in store.infos:
        name = key.removeprefix(PREFIX)
        own = next((own for own in _OWN if name.endswith(f".{own}")), None)
        if own is not None:
            by_module.setdefault(name.removesuffix(f".{own}"), {})[own] = key
        else:
            exact[name] = _lazy(store, key)
    return by_module, exact


def _lazy(store: TensorStore, key: str) -> LazyTensor:
    info = store.infos[key]
    return LazyTensor(info.shape, torch_dtype(info.dtype), lambda: store.read(key))


def _read(store: TensorStore, key: str, name: str) -> Tensor:
    if name == KEEP:
        return store.read(key)
    if not store.infos[key].is_float:
        raise ValueError(f"{name} is stored as {store.infos[key].dtype}, expected floating-point numbers")
    value = store.read(key).float()
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} is not finite (NaN or Inf)")
    return value


def _matrix(held: Mapping[str, Tensor]) -> LodaMatrix:
    """A matrix from its tensors by the last part of their names. Raises `ValueError`."""
    for pair in _PAIRS:
        missing = [name for name in pair if name not in held]
        if len(missing) == 1 or (missing and pair[0] == _A):
            raise ValueError(f"{missing[0]} is missing")
    A, B = held[_A], held[_B]
    f1 = (held[_F1_IN], held[_F1_OUT]) if _F1_IN in held else None
    base = LowRankDelta(held[_BASE_B], held[_BASE_A]) if _BASE_A in held else None
    if base is not None and (base.A.ndim != 2 or base.B.ndim != 2 or base.A.shape[0] != base.B.shape[1]):
        raise ValueError(f"{_BASE_A} {list(base.A.shape)} and {_BASE_B} {list(base.B.shape)} do not multiply")
    shape = (B.shape[0], A.shape[-1]) if A.ndim == B.ndim == 2 else (0, 0)
    keep = unpack_bits(held[KEEP], shape) if KEEP in held else None
    return LodaMatrix(A, B, f1, held.get(_F2), base, keep)
