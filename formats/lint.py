"""Whether a consumer would load an adapter that exists already, and run it as PEFT does: the table of profiles, read the other way."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.gguf_header import read_gguf_header
from adapt_convert.formats.location import Location, locate, read_json
from adapt_convert.formats.loda_config import PEFT_TYPE as LODA
from adapt_convert.formats.lora_names import lora_file
from adapt_convert.formats.peft import CONFIG, PREFIX, VARIANTS, changes_base, is_pattern, is_positive, lora_scaling, matching_pattern
from adapt_convert.formats.profiles import EXPERT, PROFILES, Profile, profile_named
from adapt_convert.formats.source import LORTA, adapter_config_path

_SLOT = re.compile(r"^(?P<module>.*)\.(?P<slot>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$")
_DORA, _BIAS = re.compile(r"\.lora_magnitude_vector(\.weight)?$"), re.compile(r"\.(lora_B|base_layer)\.bias$")
_TOKENS = re.compile(r"\.(token_adapter\.|trainable_tokens)")
_TABLES = ("lm_head", "embed_tokens")
# What gate, up and down are called where experts lie one by one.
_EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_TABLE = re.compile(r"\.base_layer\.weight$")  # PEFT puts the base's own table beside a LoRA of it, and every consumer skips it


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what the consumer makes of it, where it stands, and what mends it.

    `effect`: `refused`, the adapter does not load; `wrong`, it runs as another model; `lost`, a part is left out without a word.
    """

    effect: Literal["refused", "wrong", "lost"]
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.effect}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class _Adapter:
    """A PEFT LoRA as its files have it; `ranks` by module, `embeddings` the modules with factors of a table."""

    config: Mapping[str, Any]
    names: tuple[str, ...]
    ranks: Mapping[str, int]
    embeddings: tuple[str, ...]
    halves: tuple[str, ...]
    other: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> Any:
        return self.config.get("r", 8)

    @property
    def alpha(self) -> Any:
        return self.config.get("lora_alpha", 8)


def lint(adapter: str | Path, consumer: str, revision: str | None = None) -> list[Finding]:
    """What keeps `adapter` (a directory, a file or a Hub id) from running in `consumer` as it runs in PEFT: by headers and alphas.

    An empty list means that nothing was found. Raises `AdaptError` for an unknown consumer, or when there is no adapter.
    """
    profile = profile_named(consumer)
    location = locate(adapter, revision)
    remedy = f"convert it: adapt-convert delta BASE {location.origin} --for {profile.name}"
    ggufs = [location.file] if location.file else sorted(location.directory.glob("*.gguf"))
    gguf = next((path for path in ggufs if path.suffix == ".gguf"), None)
    has_config = adapter_config_path(location) is not None
    if has_config and read_json(location.directory / CONFIG).get("peft_type") == LODA:  # which is no change of weights
        remedy = f"convert the fine-tune it was made from: adapt-convert delta BASE FT --for {profile.name}"
    if profile.layout == "gguf":
        if gguf is None:
            return [Finding("refused", f"{profile.title} loads GGUF files, and there is none", remedy)]
        return list(_gguf_findings(gguf, profile, remedy))
    if gguf is not None and not has_config:
        return [Finding("refused", f"{profile.title} loads no GGUF files", "convert the fine-tune or the adapter it was made from")]
    store = TensorStore(_weights(location, profile))
    names = tuple(store.infos)
    if not names:
        raise AdaptError(f"{location.origin}: holds no tensors")
    if profile.layout == "diffusers" and all(re.match(PROFILES["kohya"].keys, name) for name in names):
        return list(_kohya_in_diffusers(store, profile, remedy))
    foreign = [name for name in names if not re.match(profile.keys, name)]
    if foreign:
        effect: Literal["refused", "lost"] = "lost" if profile.layout == "diffusers" else "refused"
        if foreign[0].startswith(PREFIX) and profile.layout != "peft":
            remedy = f"{profile.title} runs diffusion models alone; if this adapts one, {remedy}"
        return [Finding(effect, f"{profile.title} knows no tensor {foreign[0]}{_more(foreign)}", remedy)]
    if profile.layout != "peft":
        return []
    config = read_json(location.directory / CONFIG)
    if config.get("peft_type") != "LORA":
        return _of_another_method(config.get("peft_type"), profile, remedy)
    read = _read(config, store)
    if malformed := list(_malformed(config)):
        return malformed
    return [finding for check in _CHECKS for finding in check(read, profile, remedy)]


def _of_another_method(method: object, profile: Profile, remedy: str) -> list[Finding]:
    """PEFT loads all methods but this project's own; others load LoRA alone."""
    if profile.name != "peft":
        return [Finding("refused", f"{profile.title} loads LoRA alone, and this is {method}", remedy)]
    if method in (LORTA, LODA):
        return [Finding("refused", f"{profile.title} knows no {method}; adapt_convert.load runs it", remedy)]
    return []


def _weights(location: Location, profile: Profile) -> list[Path]:
    if location.file or profile.layout == "peft":
        if not location.file and adapter_config_path(location) is None:
            raise AdaptError(f"{location.origin}: has no {CONFIG}, so it is no adapter that {profile.title} loads")
        return weight_files(location)
    found = [location.directory / profile.weights] if profile.weights else sorted(location.directory.glob("*.safetensors"))
    found = [path for path in found if path.is_file()]
    if not found:
        only = lora_file(location) or next(iter(sorted(location.directory.glob("*.safetensors"))), None)
        return [only] if only else weight_files(location)
    return found


def _kohya_in_diffusers(store: TensorStore, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Kohya's names, which diffusers translates; of several alphas it gives some attention matrices those of others."""
    keys = [name for name in store.infos if name.endswith(".alpha") and math.prod(store.infos[name].shape) == 1]
    alphas = sorted({float(store.read(name)) for name in keys})
    if len(alphas) > 1:
        what = f"alphas from {alphas[0]:g} to {alphas[-1]:g}, of which {profile.title} {profile.version} hands some modules those of others"
        yield Finding("wrong", what, remedy)


def _read(config: Mapping[str, Any], store: TensorStore) -> _Adapter:
    slots: dict[str, dict[str, int]] = {}
    other = []
    for name, info in store.infos.items():
        match = _SLOT.match(name.removeprefix(PREFIX))
        if match and info.shape:
            slots.setdefault(match["module"], {})[match["slot"]] = info.shape[0] if match["slot"].endswith(("A", "A.weight")) else 0
        elif not _TABLE.search(name):
            other.append(name)
    ranks = {module: max(slot.values()) for module, slot in slots.items()}
    embeddings = tuple(module for module, slot in slots.items() if any(name.startswith("lora_embedding") for name in slot))
    halves = tuple(module for module, slot in slots.items() if len(slot) % 2)
    return _Adapter(config, tuple(store.infos), ranks, embeddings, halves, tuple(other))


def _malformed(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Values of the config that no consumer can make sense of."""
    saved, base = config.get("modules_to_save"), config.get("base_model_name_or_path")
    sound = {
        "r": is_positive(config.get("r", 8)),
        "lora_alpha": is_positive(config.get("lora_alpha", 8)),
        "rank_pattern": is_pattern(config.get("rank_pattern") or {}),
        "alpha_pattern": is_pattern(config.get("alpha_pattern") or {}),
        "modules_to_save": saved is None or (isinstance(saved, list) and all(isinstance(name, str) for name in saved)),
        "base_model_name_or_path": base is None or isinstance(base, str),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            yield Finding(
                "refused", f"{CONFIG} has {key} = {reprlib.repr(config.get(key))}, which makes no sense", "write the adapter again"
            )


def _more(names: Sequence[Any]) -> str:
    return f" (and {len(names) - 1} more such)" if len(names) > 1 else ""


def _forms(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """What the config switches on and the consumer does not know."""
    config, title = adapter.config, profile.title
    if (config.get("use_dora") or any(map(_DORA.search, adapter.other))) and not profile.dora:
        yield Finding("refused", f"{title} does not run DoRA", remedy)
    if config.get("fan_in_fan_out") and not profile.conv1d:
        yield Finding("refused", f"{title} has no LoRA for matrices stored (in, out) (fan_in_fan_out)", "serve the merged model")
    for key in profile.required:
        if key not in config:
            yield Finding("refused", f"{title} wants {key} in {CONFIG}, which does not say it", "write the adapter again")
    if profile.name != "peft":
        yield from _variants(config, profile, remedy)
    targets = config.get("target_modules")
    if profile.lists_targets and isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding("refused", f"{title} takes target_modules as a list, and it is the expression {targets!r}", remedy)
    for module in adapter.halves[:1]:
        yield Finding("refused", f"{module} has only one half of its factor pair{_more(list(adapter.halves))}", "write the adapter again")


def _variants(config: Mapping[str, Any], profile: Profile, remedy: str) -> Iterator[Finding]:
    """Settings by which PEFT runs something else than the base and `B A`; `profile` is not PEFT's."""
    title, model_type = profile.title, _model_type(config)
    for key in ("layer_replication", "trainable_token_indices"):
        if config.get(key):
            yield Finding("refused", f"{title} does not know {key}", remedy)
    undecided = model_type is None and profile.stacked_types
    if config.get("target_parameters") and not undecided and model_type not in profile.stacked_types:
        yield Finding("refused", f"{title} takes no stacks of experts (target_parameters){_of(model_type)}", remedy)
    for key in VARIANTS:
        if config.get(key) and key != "use_dora":
            effect: Literal["refused", "wrong"] = "refused" if key in profile.refuses else "wrong"
            mends = "run it in PEFT" if key == "alora_invocation_tokens" else remedy  # it depends on the prompt: no matrix does the same
            yield Finding(effect, f"{title} does not know {key}", mends)
    start = config.get("init_lora_weights")
    if profile.starts is not None and isinstance(start, str) and start.lower() not in profile.starts:
        yield Finding("refused", f"{title} does not take init_lora_weights {start!r}", remedy)
    elif profile.starts is None and changes_base(config) and str(start).lower() != "lora_ga":  # which does so in training alone
        yield Finding("wrong", f"{title} leaves in the base what init_lora_weights {start!r} takes out of it in PEFT", remedy)


def _of(model_type: str | None) -> str:
    return f" of a {model_type}" if model_type else ""


def _whole_tensors(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Biases and tensors stored as they are."""
    biases = [name for name in adapter.other if _BIAS.search(name)]
    tables = [name for name in adapter.other if _TOKENS.search(name)]
    whole = [name for name in adapter.other if name not in biases and name not in tables and not _DORA.search(name)]
    saved = adapter.config.get("modules_to_save") or []
    if profile.exact:
        names = [name.removeprefix(PREFIX) for name in whole]
        lost = [name for name in names if not any(f"{module}." in f"{name}." for module in saved)]  # PEFT takes endings of paths
        if lost:
            yield Finding("lost", f"{profile.title} ignores {lost[0]}{_more(lost)}, which modules_to_save does not list", "list its module")
        if any(".lora_B.bias" in name for name in biases) and not adapter.config.get("lora_bias"):
            yield Finding("lost", f"{profile.title} ignores {biases[0]}{_more(biases)} without lora_bias", "set lora_bias to true")
        return
    said = profile.reads_bias and adapter.config.get("bias", "none") != "none"
    if (biases or said) and not profile.biases:
        what = f"{biases[0]}{_more(biases)}" if biases else "bias in the config"
        yield Finding("refused", f"{profile.title} has no LoRA of biases: {what}", remedy)
    if whole or saved:
        what = f"{whole[0]}{_more(whole)}" if whole else f"modules_to_save {saved}"
        yield Finding("refused", f"{profile.title} loads no whole tensors: {what}", remedy)
    if tables:
        yield Finding("refused", f"{profile.title} loads no vocabulary of the adapter's own: {tables[0]}{_more(tables)}", remedy)


def _sizes(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Ranks that are too large, or that the config does not say."""
    largest = max(adapter.ranks.values(), default=0)
    if profile.max_rank is not None and largest > profile.max_rank:
        yield Finding(
            "refused", f"rank {largest} is above {profile.title}'s largest, {profile.max_rank}", f"{remedy} --rank {profile.max_rank}"
        )
    pattern = adapter.config.get("rank_pattern") or {}
    for module, rank in adapter.ranks.items():
        said = adapter.rank
        if profile.scale == "modules":
            said = matching_pattern(pattern, [module], said)
        if profile.scale != "rank" and (rank != said if profile.equal_ranks or profile.scale == "modules" else rank > said):
            yield Finding("refused", f"{module} has rank {rank} where {profile.title} expects r = {said}", remedy)
            return


def _scales(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Matrices that the consumer multiplies by something else than PEFT does."""
    if profile.scale == "modules":
        return
    for module, rank in adapter.ranks.items():
        meant = lora_scaling(adapter.config, module, rank)
        divisor = float(adapter.rank if profile.scale == "r" else rank)
        if profile.rslora and adapter.config.get("use_rslora"):
            divisor = math.sqrt(divisor)
        given = float(adapter.alpha) / divisor
        if not math.isclose(meant, given, rel_tol=1e-6):
            title = f"{profile.title} before {profile.modules_since}" if profile.modules_since else profile.title
            what = f"{module} is meant to be scaled by {meant:.6g}, and {title} takes {given:.6g}"
            yield Finding("wrong", f"{what} (lora_alpha, patterns, rsLoRA)", remedy)
            return


def _modules(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Matrices that the consumer does not adapt, or not without others."""
    model_type = _model_type(adapter.config)
    if model_type in profile.types_without:
        yield Finding("refused", f"{profile.title} has no LoRA for a {model_type}", "serve the merged model")
        return
    tables = {module: name == "lm_head" for module, name in _named(adapter) if module in adapter.embeddings or name in _TABLES}
    for module, head in tables.items():
        never = (profile.head_types if head else profile.embedding_types) == ()
        if never or (model_type and not profile.adapts_table(model_type, head)):
            yield Finding("lost" if never else "refused", f"{profile.title} adapts no {module}{_of(model_type)}", remedy)
            break
    unknown = [module for module, name in _named(adapter) if module not in tables and profile.modules and name not in profile.modules]
    if unknown:
        yield Finding("refused", f"{profile.title} adapts no matrix of the name of {unknown[0]}{_more(unknown)}", remedy)
    for module in adapter.ranks:
        absent = [name.rsplit(".", 1)[-1] for name in profile.needed_beside(module) if name not in adapter.ranks]
        if absent:
            yield Finding("refused", f"{profile.title} wants {', '.join(absent)} adapted beside {module}", remedy)
            break
    yield from _experts(adapter, profile, remedy)


def _named(adapter: _Adapter) -> list[tuple[str, str]]:
    """Every module with the last part of its name."""
    return [(module, module.rsplit(".", 1)[-1]) for module in adapter.ranks]


def _experts(adapter: _Adapter, profile: Profile, remedy: str) -> Iterator[Finding]:
    """Experts that are adapted in part; how many there are the highest number tells."""
    found = [match for match in map(EXPERT.fullmatch, adapter.ranks) if match]
    if profile.experts == "any" or not found:
        return
    gate, up, down = next((names for names in _EXPERTS if found[0][3] in names), _EXPERTS[0])
    if profile.experts == "kinds":
        present = {name for _, name in _named(adapter)}
        missing = [name for name in (gate, down) if name not in present]
        if missing:
            yield Finding("lost", f"{profile.title} adapts no experts without {missing[0]}, and so not {found[0][0]}{_more(found)}", remedy)
        return
    count = 1 + max(int(match[2]) for match in found)
    for stack in dict.fromkeys(match[1] for match in found):
        wanted = [f"{stack}.{number}.{name}" for number in range(count) for name in (gate, up, down)]
        absent = [module for module in wanted if module not in adapter.ranks]
        if absent:
            yield Finding("refused", f"{profile.title} wants all experts of a layer adapted, and not {absent[0]}{_more(absent)}", remedy)
            return


def _model_type(config: Mapping[str, Any]) -> str | None:
    """Of the base, where it lies on this machine."""
    path = Path(config.get("base_model_name_or_path") or ".") / "config.json"
    try:
        named = read_json(path).get("model_type") if path.is_file() else None
    except (OSError, ValueError):  # no file can be called so
        return None
    return named if isinstance(named, str) else None


_CHECKS = (_forms, _whole_tensors, _sizes, _scales, _modules)


def _gguf_findings(path: Path, profile: Profile, remedy: str) -> Iterator[Finding]:
    header = read_gguf_header(path)
    if header.kind != "adapter" or header.adapter != "lora":
        kind = " ".join(part for part in (header.adapter, header.kind) if part) or "model"
        yield Finding("refused", f"{path.name} is a {kind}, not a LoRA adapter", remedy)
        return
    norms = [name for name in header.shapes if name.endswith("_norm.weight")]
    if norms:
        yield Finding("lost", f"{profile.title} passes over {norms[0]}{_more(norms)}", remedy)
    unknown = [name for name in header.shapes if name not in norms and not re.match(profile.keys, name)]
    if unknown:
        yield Finding("refused", f"{profile.title} knows no tensor {unknown[0]}{_more(unknown)}", remedy)
    pairs = {name[:-7] for name in header.shapes if re.match(profile.keys, name)}
    halves = [name for name in sorted(pairs) if not {f"{name}.lora_a", f"{name}.lora_b"} <= set(header.shapes)]
    if halves:
        yield Finding("refused", f"{halves[0]} has only one half of its factor pair{_more(halves)}", remedy)
    flat = [name for name, shape in header.shapes.items() if re.match(profile.keys, name) and len(shape) != 2]
    if flat:
        yield Finding("refused", f"{flat[0]} is no matrix{_more(flat)}", remedy)
        return
    ranks = {header.shapes[f"{name}.lora_b"][1] for name in pairs - set(halves)}
    if header.alpha and len(ranks) > 1:
        yield Finding("wrong", f"ranks {sorted(ranks)} under one alpha {header.alpha:g} are scaled apart", remedy)
