"""LoRA files of the image world: those of kohya's scripts, ComfyUI, LyCORIS and diffusers, one safetensors file each.

Which module of the base a tensor belongs to is found by `formats/diffusion.py`; here is what the tensors mean. `W` is the base's
weight, `(out, in)` or `(out, in, kh, kw)`:

| tensors | change of W |
| --- | --- |
| `lora_down`, `lora_up` (or `lora_A`, `lora_B`; `lora.down`, `lora.up`), `alpha` | `alpha / r  up down` |
| and `lora_mid (r, r, kh, kw)` | `alpha / r  up (mid down)` (Tucker) |
| `hada_w1_a (out, r)`, `hada_w1_b (r, in)`, `hada_w2_a`, `hada_w2_b` | `alpha / r  (w1_a w1_b) * (w2_a w2_b)` (LoHa, arXiv 2108.06098) |
| `lokr_w1`, `lokr_w2`, each whole or as `_a`, `_b` | `alpha / r  w1 (x) w2` (LoKr, arXiv 2212.10650) |
| any of them with `dora_scale` or `lora_magnitude_vector`, `m` | `m (W + D) / ||W + D|| - W` (DoRA, arXiv 2402.09353) |
| `diff`, `diff_b` | itself |
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.reconstruct import hadamard, kronecker, product_of, with_magnitude
from adapt_convert.formats.checkpoint import Checkpoint, TensorStore
from adapt_convert.formats.diffusion import from_original_names, layout_of, spellings
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.lora_names import OTHER_METHODS, slot_of
from adapt_convert.formats.peft import check_patterns, is_positive, lora_scaling
from adapt_convert.formats.safetensors_file import SafetensorsFile
from adapt_convert.formats.source import WITHOUT_MAGNITUDE, Part, Source

_METADATA = "lora_adapter_metadata"


def read_lora_file(location: Location, path: Path, base: Checkpoint, parameters: Mapping[str, str]) -> Source:
    """Open a LoRA file for `base`; `parameters` lead from its parameters to its keys. Reads headers, and the alphas.

    Raises `AdaptError` for a module that the base lacks or that two of its modules could be, for an incomplete or contradicting set
    of tensors, and for a method whose tensors are none of the above, by its name.
    """
    store = TensorStore([path])
    modules = _by_module(location, store)
    paths = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    meant = _resolve(location, base, modules, paths)
    scales = _Scales(location, store, _metadata(location, path))
    figures: dict[str, dict[str, float]] = {}
    parts: dict[str, Part] = {}
    for spelling, slots in modules.items():
        module = meant[spelling]
        key = parameters[f"{module}.weight"]
        reader = _Module(location, store, base, module, key, spelling, slots, scales.of(spelling, slots), figures)
        for part in reader.parts(parameters.get(f"{module}.bias")):
            if part.name in parts:
                raise AdaptError(f"{location.origin}: {spelling} adapts {module}, which {parts[part.name].keys[0]} adapts already")
            parts[part.name] = part
    low_rank = all(part.kind == "low_rank" for part in parts.values())
    return Source("lora" if low_rank else "method", location, {}, store, parts, {}, figures)


def _by_module(location: Location, store: TensorStore) -> dict[str, dict[str, str]]:
    """Spelling of a module -> kind of tensor -> key."""
    modules: dict[str, dict[str, str]] = {}
    for key in store.infos:
        slot = slot_of(key)
        if slot is None:
            method = OTHER_METHODS.search(key)
            raise AdaptError(
                f"{location.origin}: holds {key}, which is {'of a method that is not supported' if method else 'no tensor of a LoRA'}"
            )
        if slot[1] in modules.setdefault(slot[0], {}):
            raise AdaptError(f"{location.origin}: holds {modules[slot[0]][slot[1]]} and {key}, which are the same tensor")
        modules[slot[0]][slot[1]] = key
    return modules


def _resolve(location: Location, base: Checkpoint, names: Iterable[str], paths: list[str]) -> dict[str, str]:
    """Which module of the base each spelling means."""
    known = spellings(base, paths)
    found = {name: known[name] for name in names if name in known}
    original = [
        name
        for name in names
        if name not in known and re.search(r"_(input_blocks|middle_block|output_blocks|time_embed|label_emb|out_2)_?", name)
    ]
    if original and layout_of(base) in ("pipeline", "component"):
        found |= _from_original(location, base, original, known)
    for name in names:
        if name not in found:
            raise AdaptError(f"{location.origin}: adapts {name}, which {base.origin} does not have; is this the right base?")
        if len(found[name]) > 1:
            raise AdaptError(f"{location.origin}: {name} may be {found[name][0]} or {found[name][1]}; there is no telling which")
    return {name: meant[0] for name, meant in found.items()}


def _from_original(location: Location, base: Checkpoint, names: list[str], known: Mapping[str, list[str]]) -> dict[str, list[str]]:
    config = base.location.directory / ("unet/config.json" if layout_of(base) == "pipeline" else "config.json")
    try:
        mapped = from_original_names(names, read_json(config))
    except ImportError:
        raise AdaptError(
            f"{location.origin}: names modules after the original UNet, and diffusers knows its own names for them: pip install diffusers"
        ) from None
    except (ValueError, IndexError):
        raise AdaptError(f"{location.origin}: names modules that are not of {base.origin}; is this the right base?") from None
    return {name: known[f"unet.{path}"] for name, path in mapped.items() if f"unet.{path}" in known}


def _metadata(location: Location, path: Path) -> dict[str, Any]:
    """What diffusers notes of the scales, `{component}.{field of PEFT's config}`; empty for other writers."""
    text = SafetensorsFile(path).metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise AdaptError(f"{location.origin}: has {_METADATA} in its header that is no JSON object")
    return value


@dataclass(frozen=True)
class _Scales:
    """`alpha / r` of each module: from its own `alpha`, else from diffusers' metadata, else 1."""

    location: Location
    store: TensorStore
    metadata: Mapping[str, Any]

    def of(self, spelling: str, slots: Mapping[str, str]) -> float:
        rank = self._rank(slots)
        if rank is None:
            return 1.0
        if "alpha" in slots:
            info = self.store.infos[slots["alpha"]]
            alpha = float(self.store.read(slots["alpha"])) if math.prod(info.shape) == 1 else math.nan
            if not is_positive(alpha):
                raise AdaptError(f"{self.location.origin}: {slots['alpha']} is {alpha:g}, expected one positive number")
            return alpha / rank
        component, _, inside = spelling.partition(".")
        config = {name.removeprefix(f"{component}."): v for name, v in self.metadata.items() if name.startswith(f"{component}.")}
        check_patterns(self.location, config)
        return lora_scaling(config, inside, rank) if is_positive(config.get("lora_alpha")) else 1.0

    def _rank(self, slots: Mapping[str, str]) -> int | None:
        """The rank that alpha is divided by: that of the second factors; a LoKr of two whole matrices has none."""
        second = next((slots[name] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in slots), None)
        shape = self.store.infos[second].shape if second else ()
        return shape[0] if shape and shape[0] else None


@dataclass(frozen=True)
class _Module:
    """One adapted module: `slots` lead from kinds of tensors to keys, `key` is the base's weight."""

    location: Location
    store: TensorStore
    base: Checkpoint
    module: str
    key: str
    spelling: str
    slots: Mapping[str, str]
    scale: float
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.infos[self.key].shape

    def parts(self, bias: str | None) -> Iterable[Part]:
        name, keys = f"{self.module}.weight", tuple(self.slots.values())
        held = set(self.slots) - {"alpha", "magnitude", "dora_scale", "bias", "diff_b"}
        for key in keys:
            if not self.store.infos[key].is_float:
                raise AdaptError(
                    f"{self.location.origin}: {key} is stored as {self.store.infos[key].dtype}, expected floating-point numbers"
                )
        if held & {"down", "up"} and not {"magnitude", "dora_scale"} & set(self.slots):
            self._check_complete(held)
            rank, dtype = self._check_product(), self.store.infos[self.slots["down"]].dtype
            yield Part(name, keys, self.shape, dtype, "low_rank", self._low_rank, rank)
        elif held:
            self._check_complete(held)
            if "down" in held:
                self._check_product()
            yield Part(name, keys, self.shape, "F32", "add", functools.partial(self._add, name))
        for slot in ("bias", "diff_b"):
            if slot in self.slots:
                if bias is None:
                    raise AdaptError(f"{self.location.origin}: {self.slots[slot]} has no bias in {self.base.origin} to change")
                factor = self.scale if slot == "bias" else 1.0
                load = functools.partial(lambda key, factor: self._read(key) * factor, slot, factor)
                yield Part(f"{self.module}.bias", (self.slots[slot],), self.base.infos[bias].shape, "F32", "add", load)

    def _read(self, slot: str) -> Tensor:
        return self.store.read(self.slots[slot]).float()

    def _low_rank(self) -> LowRankDelta:
        mid = self._read("mid") if "mid" in self.slots else None
        return product_of(self._read("down"), self._read("up"), mid, self.scale)

    def _add(self, name: str) -> Tensor:
        """The change of a method whose result is no product of two factors, in the base's layout."""
        change = self._change()
        if change.numel() != math.prod(self.shape):
            raise self._contradiction(f"a change of {list(change.shape)}")
        change = change.reshape(self.shape)
        slot = next((slot for slot in ("magnitude", "dora_scale") if slot in self.slots), None)
        if slot is None:
            return change
        magnitude = self._read(slot)
        rows = slot == "magnitude" or magnitude.shape[0] == self.shape[0]  # LyCORIS says (out, 1 ...) or (1, in ...)
        if magnitude.numel() != self.shape[0 if rows else 1]:
            raise self._contradiction(f"a magnitude of {list(magnitude.shape)}")
        weight = self.base.read(self.key)
        whole = with_magnitude(weight, change, magnitude, rows, 0.0 if slot == "magnitude" else torch.finfo(torch.float32).eps)
        energy = float(whole.double().square().sum())
        if energy:
            missed = float((whole - change).double().square().sum())
            self.figures[name] = {WITHOUT_MAGNITUDE: 1 - missed / energy}
        return whole

    def _change(self) -> Tensor:
        if "down" in self.slots:
            return self._low_rank().dense()
        if "diff" in self.slots:
            return self._read("diff")
        kind, rebuild = ("hada_", hadamard) if "hada_w1_a" in self.slots else ("lokr_", kronecker)
        tensors = {slot.removeprefix(kind): self._read(slot) for slot in self.slots if slot.startswith(kind)}
        try:
            return rebuild(tensors) * self.scale
        except RuntimeError:  # torch's own words name neither the file nor the tensors
            raise self._contradiction(", ".join(f"{n} {list(t.shape)}" for n, t in sorted(tensors.items()))) from None

    def _check_product(self) -> int:
        """The rank, once both factors are known to multiply to the base's shape."""
        shapes = {slot: self.store.infos[self.slots[slot]].shape for slot in ("down", "up", "mid") if slot in self.slots}
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
        wide = math.prod(down[1:]) * (math.prod(mid[2:]) if mid else 1)
        inner = mid[1:2] == down[:1] and mid[:1] == up[1:2] if mid else down[:1] == up[1:2]
        if not (inner and down[:1] != (0,) and math.prod(up[:1]) == rows and math.prod(up[1:]) == up[1] and wide == columns):
            raise self._contradiction(", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items()))
        return up[1]

    def _check_complete(self, held: set[str]) -> None:
        """Every tensor that a method needs is there, and none of another one."""
        if held in ({"diff"}, {"down", "up"}, {"down", "up", "mid"}):
            return
        loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        lokr = [{"lokr_w1"} | {"lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}]
        lokr += [{"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}]
        cored = [loha | {"hada_t1", "hada_t2"}, *(each | {"lokr_t2"} for each in lokr if "lokr_w2_a" in each)]
        if held not in (loha, *lokr, *cored):
            raise AdaptError(
                f"{self.location.origin}: {self.spelling} has {', '.join(sorted(held))}, which is no complete set of one method"
            )

    def _contradiction(self, what: str) -> AdaptError:
        return AdaptError(f"{self.location.origin}: {self.spelling} has {what}, and {self.module} is {list(self.shape)} in the base")
