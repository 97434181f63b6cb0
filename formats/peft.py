"""PEFT LoRA directories: reading one as factored deltas, and writing one that an unmodified PEFT loads.

Layout as of PEFT 0.21: `adapter_config.json` and `adapter_model.safetensors`, keys `base_model.model.<module>.` followed by
`lora_A.weight (r, in)`, `lora_B.weight (out, r)`, `lora_B.bias`, `lora_embedding_A (r, vocabulary)`,
`lora_embedding_B (hidden, r)`, `base_layer.weight | bias`, or the parameter itself for a module in `modules_to_save`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.experts import stack_pattern
from adapt_convert.convert.family import Experts
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.peft_experts import Stack, Targets, complete, expert_targets, stack_of, stack_parts, stacks
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors
from adapt_convert.formats.source import Part, Source, whole_part

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_NO_MODULES = "dummy-target-modules"  # PEFT's own word for an adapter that targets none; without it PEFT refuses one
_SUFFIXES = re.compile(
    r"^(?P<module>.*)\.(?P<slot>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|base_layer\.weight|base_layer\.bias|lora_magnitude_vector(\.weight)?)$"
)
_FOREIGN = re.compile(r"(^|\.)(lora_[^.]*|token_adapter|trainable_tokens[^.]*)(\.|$)")
# A LoRA that starts so is trained against another base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens")


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether `B A` and its scale say all: LoRA, no variant such as DoRA, and no start that changes the base."""
    return config.get("peft_type") == "LORA" and not changes_base(config) and not any(config.get(name) for name in VARIANTS)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter starts from a part of the base's weight that PEFT takes out of the base when it loads the adapter."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)


def read_lora(
    location: Location, experts: Experts | None = None, is_of_base: Callable[[str, TensorStore, str], bool] | None = None
) -> Source:
    """Open a PEFT LoRA directory; alpha, rsLoRA and both patterns are folded into `B`. Reads headers, and tables beside a LoRA.

    `experts` are those of the base, whose stacks an adapter may name; each becomes one part for each expert. `is_of_base(parameter,
    store, key)` says whether a tensor has the base's own value: PEFT saves the whole table beside a LoRA of an embedding or a head,
    whether it was resized or not, and only a table of another value is a change. Without it every such table counts as one.

    Raises `AdaptError` for another PEFT method, a variant such as DoRA, a missing half of a factor pair or contradicting shapes.
    """
    config = read_json(location.directory / CONFIG)
    _check_supported(location, config)
    store = TensorStore(weight_files(location))
    if not store.infos:
        raise AdaptError(f"{location.origin}: holds no tensors")
    slots: dict[str, dict[str, str]] = {}
    parts: dict[str, Part] = {}
    ignored = untrained_copies(store)
    for key in [key for key in store.infos if key not in ignored]:
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        match = _SUFFIXES.match(name)
        if match and match["slot"] == "lora_B.bias" and not store.read(key).any():
            ignored[key] = "a bias of zeros"  # `lora_bias` puts one on every module, also where the base has no bias
        elif match:
            slots.setdefault(match["module"], {})[match["slot"]] = key
        elif _FOREIGN.search(name):
            raise AdaptError(f"{location.origin}: holds {name}, which no plain LoRA has; merge the adapter with PEFT first")
        else:
            parts[name] = whole_part(store, name, key)
    for module, slot in slots.items():
        table = slot.get("base_layer.weight")
        if table and is_of_base and is_of_base(f"{module}.weight", store, table):
            ignored[slot.pop("base_layer.weight")] = "the base's own value, which PEFT saves beside a LoRA of a table"
        read = _module_parts
        if experts and (stack := stack_of(module, config.get("target_parameters") or [], experts)):
            read = functools.partial(_stack_parts, stack, experts)
        for part in read(location, store, config, module, slot):
            parts[part.name] = part
    return Source("lora", location, config, store, parts, ignored)


def untrained_copies(store: TensorStore) -> dict[str, str]:
    """The tensors that PEFT saves of a module in `modules_to_save` as it was before training, where its table was enlarged; and why
    they change nothing."""
    return {key: "the value before training, which PEFT saves beside the trained one" for key in store.infos if ".original_module." in key}


def _check_supported(location: Location, config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("peft_type"), str):
        raise AdaptError(f"{location.origin}: {CONFIG} has peft_type = {config.get('peft_type')!r}, not LORA")
    if config["peft_type"] != "LORA":
        raise AdaptError(f"{location.origin}: is a PEFT {config.get('peft_type')} adapter, not a LoRA")
    if not is_plain_lora(config):
        raise AdaptError(
            f"{location.origin}: is a LoRA with more to it than two factors (DoRA, PiSSA ...); `adapt-convert delta` makes a plain one"
        )
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise AdaptError(f"{location.origin}: {CONFIG} has target_parameters = {parameters!r}, expected a list of names")
    if config.get("layer_replication"):
        raise AdaptError(f"{location.origin}: replicates layers, so its deltas belong to no base tensor")
    for key in ("r", "lora_alpha"):
        if not is_positive(config.get(key, 8)):
            raise AdaptError(f"{location.origin}: {CONFIG} has {key} = {config.get(key)!r}, expected a positive number")
    check_patterns(location, config)


def check_patterns(location: Location, config: Mapping[str, Any]) -> None:
    """Refuse an `alpha_pattern` or `rank_pattern` that is not regular expressions and positive numbers."""
    for key in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(key) or {}
        if not is_pattern(patterns):
            raise AdaptError(f"{location.origin}: has {key} = {patterns!r}, expected regular expressions and numbers")


def is_positive(value: object) -> bool:
    """Whether a value from a JSON file is a finite number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_pattern(value: object) -> bool:
    """Whether a value from a JSON file is a `rank_pattern` or an `alpha_pattern`: expressions to positive numbers."""
    return isinstance(value, dict) and all(_is_expression(pattern) and is_positive(number) for pattern, number in value.items())


def _is_expression(pattern: str) -> bool:
    """Whether it is a regular expression that is soon through with a name.

    A repeated group, or many repetitions in a row, can be made to backtrack for years; no name of modules needs them.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return not re.search(r"\)[*+{]", pattern) and all(len(re.findall(r"[*+{]", branch)) <= 4 for branch in pattern.split("|"))


def _module_parts(
    location: Location, store: TensorStore, config: Mapping[str, Any], module: str, slot: Mapping[str, str]
) -> Iterable[Part]:
    if any(name.startswith("lora_magnitude_vector") for name in slot):
        raise AdaptError(f"{location.origin}: {module} has a DoRA magnitude; merge the adapter with PEFT first")
    embedding = "lora_embedding_A" in slot or "lora_embedding_B" in slot
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if any(name in slot for name in names):
        yield _low_rank(location, store, config, module, slot, names)
    if "lora_B.bias" in slot:
        yield _added_bias(store, config, module, slot["lora_B.bias"], _rank(store, slot, names[0]))
    if "base_layer.bias" in slot:
        yield whole_part(store, f"{module}.bias", slot["base_layer.bias"])


def _stack_parts(
    stack: str,
    experts: Experts,
    location: Location,
    store: TensorStore,
    config: Mapping[str, Any],
    module: str,
    slot: Mapping[str, str],
) -> Iterable[Part]:
    """The parts of a stack of experts, one for each matrix, from its common factors."""
    whole = _low_rank(location, store, config, module, slot, ("lora_A.weight", "lora_B.weight"))
    rank = matching_pattern(config.get("rank_pattern") or {}, [stack], config.get("r", 8))
    if not isinstance(rank, int) or whole.rank is None or whole.rank % rank:
        raise AdaptError(f"{location.origin}: {module} has {whole.rank} rows, no multiple of the rank {rank!r} that {CONFIG} gives {stack}")
    alpha = float(matching_pattern(config.get("alpha_pattern") or {}, [stack], config.get("lora_alpha", 8)))
    return stack_parts(store, slot["lora_A.weight"], slot["lora_B.weight"], stack, rank, scaling(config, alpha, rank), experts)


def _rank(store: TensorStore, slot: Mapping[str, str], name: str) -> int:
    return store.infos[slot[name]].shape[0] if name in slot else 1


def _low_rank(
    location: Location,
    store: TensorStore,
    config: Mapping[str, Any],
    module: str,
    slot: Mapping[str, str],
    names: tuple[str, str],
) -> Part:
    for name in names:
        if name not in slot:
            raise AdaptError(f"{location.origin}: {module} has only one half of its factor pair; {name} is missing")
    key_a, key_b = slot[names[0]], slot[names[1]]
    info_a, info_b = store.infos[key_a], store.infos[key_b]
    kernel = info_a.shape[2:]
    if len(info_a.shape) < 2 or info_b.shape[2:] != (1,) * len(kernel) or len(info_b.shape) < 2:
        raise AdaptError(
            f"{location.origin}: {module} has factors of shape {list(info_a.shape)} and {list(info_b.shape)}, "
            "which are neither matrices nor those of a convolution"
        )
    for key in (key_a, key_b):
        if not store.infos[key].is_float:
            raise AdaptError(f"{location.origin}: {key} is stored as {store.infos[key].dtype}, expected floating-point numbers")
    rank = info_a.shape[0]
    if info_b.shape[1] != rank or rank == 0:
        raise AdaptError(
            f"{location.origin}: {module} has factors A {list(info_a.shape)} and B {list(info_b.shape)}, which do not multiply"
        )
    scale = lora_scaling(config, module, rank)
    embedding = names[0] == "lora_embedding_A"
    base_layer = slot.get("base_layer.weight")

    def load() -> LowRankDelta:
        a, b = store.read(key_a).float().flatten(1), store.read(key_b).float().flatten(1) * scale
        return LowRankDelta(a.T, b.T) if embedding else LowRankDelta(b, a)

    def load_with_base() -> Tensor:
        assert base_layer is not None
        return store.read(base_layer).float() + load().dense()

    shape: tuple[int, ...] = (info_a.shape[1], info_b.shape[0]) if embedding else (info_b.shape[0], *info_a.shape[1:])
    if base_layer:  # PEFT saves the whole table beside its LoRA when the vocabulary may have changed
        shape = store.infos[base_layer].shape
        return Part(f"{module}.weight", (key_a, key_b, base_layer), shape, "F32", "replace", load_with_base, rank)
    return Part(f"{module}.weight", (key_a, key_b), shape, info_a.dtype, "low_rank", load, rank)


def _added_bias(store: TensorStore, config: Mapping[str, Any], module: str, key: str, rank: int) -> Part:
    scale = lora_scaling(config, module, rank)
    info = store.infos[key]
    return Part(f"{module}.bias", (key,), info.shape, info.dtype, "add", lambda: store.read(key).float() * scale)


def scaling(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """What PEFT multiplies `B A` by: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scaling of a module, whose alpha a pattern may give."""
    names = (module, f"{module}.weight") if config.get("target_parameters") else (module,)
    alpha = matching_pattern(config.get("alpha_pattern") or {}, names, config.get("lora_alpha", 8))
    return scaling(config, float(alpha), rank)


def matching_pattern(patterns: Mapping[str, Any], names: Sequence[str], otherwise: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` gives a module or parameter: expressions anchored at a dot; the first that fits wins."""
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return otherwise


@dataclass
class LoraAdapter:
    """A LoRA to be written: `factors` by module in the output dtype, and what is stored exactly.

    `embeddings` are factors of `(vocabulary, hidden)` deltas; `biases` are differences added to the module's bias, float32;
    `exact` holds every parameter of every module in `modules_to_save`, by parameter name; `kernels` the `(in, kh, kw)` of modules
    that are convolutions, whose factors are matrices here all the same. A mixture of `experts` has whole `bias_values` in place of
    `biases`, as PEFT refuses `lora_bias` beside parameters.
    """

    factors: dict[str, LowRankDelta] = field(default_factory=dict)
    embeddings: dict[str, LowRankDelta] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    bias_values: dict[str, LazyTensor] = field(default_factory=dict)
    exact: dict[str, Tensor | LazyTensor] = field(default_factory=dict)
    exact_modules: list[str] = field(default_factory=list)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conv1d: bool = False
    experts: Experts | None = None
    all_modules: list[str] = field(default_factory=list)
    base_model: str = ""
    base_revision: str | None = None
    task_type: str | None = None

    def tensors(self) -> dict[str, Tensor | LazyTensor]:
        tensors: dict[str, Tensor | LazyTensor] = {}
        factors, stacked = self._placed()
        for module, delta in factors.items():
            first, second = stored_factors(delta, self.kernels.get(module))
            tensors[f"{PREFIX}{module}.lora_A.weight"] = first
            tensors[f"{PREFIX}{module}.lora_B.weight"] = second
            if self.biases:  # `lora_bias` is one switch for all modules: those without a changed bias get zeros
                tensors[f"{PREFIX}{module}.lora_B.bias"] = self.biases.get(module, torch.zeros(delta.shape[0]))
        for stack in stacked.values():
            tensors[f"{PREFIX}{stack.prefix}.lora_A.weight"] = stack.A
            tensors[f"{PREFIX}{stack.prefix}.lora_B.weight"] = stack.B
        tensors |= {f"{PREFIX}{module}.base_layer.bias": value for module, value in self.bias_values.items()}
        for module, delta in self.embeddings.items():
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = delta.B.T
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = delta.A.T
        for name, value in self.exact.items():
            tensors[PREFIX + name] = value
        return tensors

    def _placed(self) -> tuple[dict[str, LowRankDelta], dict[str, Stack]]:
        """The factors of modules, and those of stacks by the parameter's name."""
        if self.experts is None:
            return self.factors, {}
        if self.experts.modules:
            return complete(self.factors, self.all_modules, self.experts), {}
        pattern = stack_pattern(self.experts)
        plain = {module: delta for module, delta in self.factors.items() if not re.fullmatch(pattern, module)}
        return plain, stacks(self.factors, self.all_modules, self.experts)

    def config(self) -> dict[str, Any]:
        """The smallest config that says everything: `lora_alpha == r` everywhere, so no loader can get the scale wrong."""
        factors, stacked = self._placed()
        ranks = {module: delta.rank for module, delta in {**factors, **self.embeddings}.items()}
        targets = Targets(ranks, {}, None)
        if self.experts:
            targets = expert_targets(ranks, {name: stack.rank for name, stack in stacked.items()}, self.experts)
        named = {**targets.modules, **targets.parameters}
        listed = list(named.values())
        common = targets.rank or max(listed, key=lambda rank: (listed.count(rank), rank), default=1)
        pattern = {f"^{re.escape(name)}": rank for name, rank in sorted(named.items()) if rank != common}
        plain = [name for name in self.all_modules if f"{name}.weight" not in targets.parameters]
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "revision": self.base_revision,
            "inference_mode": True,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "bias": "lora_only" if self.bias_values else "none",
            "lora_bias": bool(self.biases),
            "fan_in_fan_out": self.conv1d,
            "target_modules": shortest_targets(targets.modules, plain) + list(targets.names) if named or targets.names else _NO_MODULES,
            **({"target_parameters": sorted(targets.parameters)} if targets.parameters else {}),
            "modules_to_save": sorted(self.exact_modules) or None,
        }

    def write(self, directory: Path) -> int:
        """Write config and weights; returns the size of the weights in bytes."""
        (directory / CONFIG).write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")
        return write_safetensors(directory / WEIGHTS, self.tensors(), {"format": "pt"})


def stored_factors(delta: LowRankDelta, kernel: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """The factors as files hold them: `(r, in)` and `(out, r)`; of a convolution, whose `kernel` is `(in, kh, kw)`, `(r, in, kh, kw)`
    and `(out, r, 1, 1)`."""
    if kernel is None:
        return delta.A, delta.B
    return delta.A.reshape(-1, *kernel), delta.B.reshape(*delta.B.shape, *[1] * (len(kernel) - 1))


def shortest_targets(targets: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """`target_modules`: the short name (`q_proj`) where every module of that name is adapted, else the full path.

    PEFT takes a short name as "every module whose path ends in it", so it may stand only for all of them.
    """
    chosen = set(targets)
    by_name: dict[str, set[str]] = {}
    for module in set(all_modules) | chosen:
        by_name.setdefault(module.rsplit(".", 1)[-1], set()).add(module)
    result = set()
    for module in chosen:
        name = module.rsplit(".", 1)[-1]
        result.add(name if by_name[name] <= chosen and not name.isdigit() else module)
    return sorted(result)
