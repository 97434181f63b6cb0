"""Every other PEFT method with a weight delta (LoHa, LoKr, VeRA, DoRA, OFT, BOFT, ...), worked out by `peft` itself.

No method is written down here a second time. For each adapted module a model of that one module is built around the base's
weight, `peft` puts its own layer there, loads the adapter and merges it; the change is `merged - base`. It is taken in float64, so that
what is left of two nearly equal numbers still has the digits of a float32, and one module is in memory at a time.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.architectures import is_embedding
from adapt_convert.formats.checkpoint import Checkpoint, TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.peft import CONFIG, PREFIX, changes_base, check_patterns, untrained_copies
from adapt_convert.formats.source import WITHOUT_MAGNITUDE, Part, Source, whole_part

# `peft` draws, and we overwrite, first values from torch's global generator; and it builds one model at a time.
_BUILDING = threading.Lock()
_PEFT_FAILS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, AssertionError)
_SHARE = ("VERA", "PVERA", "RANDLORA")  # one random tensor, as wide as the widest module, serves all of them
_NO_DELTA = ("XLORA", "POLY", "SHADOW", "LILY")  # they route or gate by the input
_WHOLE_MODEL = ("FROD", "TINYLORA", "UNILORA", "TRAINABLE_TOKENS")
_FLOAT32 = ("PSOFT",)  # refuses float64, as do the starts that change the base
_ONE_MODULE = ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "task_type")


def read_method(location: Location, base: Checkpoint, parameters: Mapping[str, str], conv1d: bool) -> Source:
    """Open an adapter of any PEFT method that merges into weights. Reads headers only.

    `parameters` lead from the parameters of the loaded model to keys of `base`; `conv1d` says that it stores weights `(in, out)`.
    Raises `AdaptError` for a method without a weight delta (prompts, routers), by its name, and for a module the base lacks.
    """
    config = read_json(location.directory / CONFIG)
    _check_mergeable(location, config)
    check_patterns(location, config)  # peft matches them without a limit of time
    store = TensorStore(weight_files(location))
    if not store.infos:
        raise AdaptError(f"{location.origin}: holds no tensors")
    adapter = _Adapter(location, store, base, parameters, conv1d, config)
    by_module, shared, parts = _sort_keys(location, store, parameters, _tuner_prefix(adapter.method))
    if not by_module:
        raise AdaptError(f"{location.origin}: says that it is a {adapter.method} adapter, and holds no tensor of one")
    shapes = {module: adapter.shape(module) for module in by_module}
    for module, keys in by_module.items():
        others = _one_of_each_shape(shapes, module) if adapter.method in _SHARE else {}
        for kind in adapter.tensors_of(module):  # some methods scale or turn the output, and the bias with it
            name, shape = f"{module}.{kind}", base.infos[parameters[f"{module}.{kind}"]].shape
            load = functools.partial(adapter.delta, module, kind, (*keys, *shared), others)
            parts[name] = Part(name, tuple(keys), shape, "F32", "add", load)
    return Source("method", location, config, store, parts, untrained_copies(store), adapter.figures)


def _check_mergeable(location: Location, config: Mapping[str, Any]) -> None:
    method = config.get("peft_type")
    quiet_bitsandbytes()
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        raise AdaptError(
            f"{location.origin}: is a PEFT {method} adapter, which only peft can read: pip install 'adapt-convert[run]'"
        ) from None
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdaptError(f"{location.origin}: {CONFIG} has peft_type = {method!r}, which the installed peft does not know")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(method)  # type: ignore[call-overload]
    if getattr(tuner, "tuner_layer_cls", None) is None or method in _NO_DELTA:
        raise AdaptError(f"{location.origin}: is a PEFT {method} adapter, which is no change of weights and so has no LoRA")
    if method in _WHOLE_MODEL:
        raise AdaptError(f"{location.origin}: is a PEFT {method} adapter, whose modules depend on each other; merge it with peft first")
    if config.get("alora_invocation_tokens"):
        raise AdaptError(f"{location.origin}: is an activated LoRA, which acts on some tokens only: no change of a weight does that")
    for key in ("target_parameters", "layer_replication"):
        if config.get(key):
            raise AdaptError(f"{location.origin}: has {key}, which is not supported for {method}")


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes, which `peft` imports where it is installed, from warning of an optional kernel for 4-bit weights."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _tuner_prefix(method: str) -> str:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return str(PEFT_TYPE_TO_PREFIX_MAPPING[method])  # type: ignore[index]


def _sort_keys(
    location: Location, store: TensorStore, parameters: Mapping[str, str], prefix: str
) -> tuple[dict[str, list[str]], list[str], dict[str, Part]]:
    """Keys by the module they adapt, keys that all modules share (VeRA's projections), and parameters saved whole."""
    by_module: dict[str, list[str]] = {}
    shared: list[str] = []
    saved: dict[str, Part] = {}
    ignored = untrained_copies(store)
    for key in [key for key in store.infos if key not in ignored]:
        if not key.startswith(PREFIX):  # `base_model.vera_A`
            shared.append(key)
            continue
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        module, found, _ = name.partition(f".{prefix}")
        if not found and ".base_layer." in name:  # a bias or a table that was trained, or saved, beside the adapter
            module, found, _ = name.partition(".base_layer.")
        if found and f"{module}.weight" in parameters:
            by_module.setdefault(module, []).append(key)
        elif found:
            raise AdaptError(f"{location.origin}: adapts {module}, which the base does not have; is this the right base?")
        else:
            saved[name] = whole_part(store, name, key)
    return by_module, shared, saved


def _one_of_each_shape(shapes: Mapping[str, tuple[int, ...]], module: str) -> dict[str, tuple[int, ...]]:
    """Modules that stand for all others where one tensor serves every module, sized by the largest: one for each shape."""
    chosen = {shape: name for name, shape in shapes.items() if shape != shapes[module]}
    return {name: shape for shape, name in chosen.items()}


@dataclass(frozen=True)
class _Adapter:
    """An opened adapter and its base; `figures` are filled in as deltas are worked out."""

    location: Location
    store: TensorStore
    base: Checkpoint
    parameters: Mapping[str, str]
    conv1d: bool
    config: Mapping[str, Any]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.config["peft_type"])

    def shape(self, module: str) -> tuple[int, ...]:
        return self.base.infos[self.parameters[f"{module}.weight"]].shape

    def tensors_of(self, module: str) -> list[str]:
        return [kind for kind in ("weight", "bias") if f"{module}.{kind}" in self.parameters]

    def delta(self, module: str, kind: str, keys: Iterable[str], others: Mapping[str, tuple[int, ...]]) -> Tensor:
        """What `peft` makes of one parameter of `module`, less the base's: float32, as the base stores it."""
        original = {name: self._precise(self.base.read(self.parameters[f"{module}.{name}"])) for name in self.tensors_of(module)}
        state = {key: self._precise(self.store.read(key)) for key in keys}
        with _BUILDING, warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                layer = self._live_layer(module, original, state, others)
                layer.merge()
                merged = layer.get_base_layer().get_parameter(kind)
                difference: Tensor = (merged - original[kind]).float()
                if self.config.get("use_dora") and kind == "weight":
                    self._compare(f"{module}.weight", difference, layer.get_delta_weight("default").float())
            except _PEFT_FAILS as error:
                raise AdaptError(f"{self.location.origin}: peft cannot merge {module}: {error}") from None
        return difference

    def _live_layer(
        self, module: str, original: Mapping[str, Tensor], state: dict[str, Tensor], others: Mapping[str, tuple[int, ...]]
    ) -> Any:
        """PEFT's layer around a copy of the base's weights, with the adapter's tensors in it."""
        import peft

        model = nn.Module()
        for name, shape in others.items():  # zeros that take no memory
            _attach(model, name, _module_of({"weight": torch.zeros(()).expand(shape)}, self._is_conv1d(name), False))
        copies = {name: value.clone() for name, value in original.items()}
        _attach(model, module, _module_of(copies, self._is_conv1d(module), is_embedding(module)))
        config = peft.PeftConfig.from_pretrained(str(self.location.directory))
        for name in _ONE_MODULE:
            if hasattr(config, name):
                setattr(config, name, None)
        config.base_model_name_or_path, config.inference_mode = None, True
        config.target_modules = [module, *others]
        live = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        result: Any = peft.set_peft_model_state_dict(live, state)
        if result.unexpected_keys:
            raise ValueError(f"it has no place for {result.unexpected_keys[0]}")
        for key in result.missing_keys:
            slot = key.removeprefix(f"{PREFIX}{module}.").removesuffix(".default")
            if slot.startswith(_tuner_prefix(self.method)) and f"base_model.{slot}" not in state:
                raise ValueError(f"the adapter lacks its {slot}")
        return live.get_submodule(f"{PREFIX}{module}")

    def _compare(self, name: str, difference: Tensor, product: Tensor) -> None:
        """Note how much of a DoRA's change its factors hold."""
        energy = float(difference.double().square().sum())
        missed = float((difference - product).double().square().sum())
        if energy:
            self.figures[name] = {WITHOUT_MAGNITUDE: 1 - missed / energy}

    def _precise(self, tensor: Tensor) -> Tensor:
        single = self.method in _FLOAT32 or changes_base(self.config)
        return tensor.to(torch.float32 if single else torch.float64) if tensor.is_floating_point() else tensor

    def _is_conv1d(self, module: str) -> bool:
        return self.conv1d and len(self.shape(module)) == 2


def _module_of(tensors: Mapping[str, Tensor], conv1d: bool, table: bool) -> nn.Module:
    """The module that holds `weight` (and `bias`), as the base model has it: linear, GPT-2's Conv1D, convolution or embedding."""
    weight, bias = tensors["weight"], "bias" in tensors
    module: nn.Module
    with torch.device("meta"):
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            module = Conv1D(weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
        elif table:
            module = nn.Embedding(*weight.shape)
        elif weight.ndim == 1:
            module = nn.LayerNorm(len(weight), bias=bias)
        elif weight.ndim == 2:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        else:
            kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
            module = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias)  # type: ignore[arg-type]
    for name, value in tensors.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def _attach(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    model.add_module(name, module)
