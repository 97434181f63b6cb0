"""Questions about a model's architecture, answered from the table of `families.py`, or by its names where it is not listed there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.families import BY_MODEL_TYPE
from adapt_convert.convert.family import Family
from adapt_convert.convert.loading import loaded_name

# A module of this last name is an embedding table, in known and unknown architectures alike; linear layers of vision models are called
# `decoder_embed`, `class_embed`, `patch_embedding` and so on.
_EMBEDDING = re.compile(
    r"(^|\.)((?!(class|bbox|patch|decoder)_)\w*embed(ding)?s?|embed_tokens|embed_positions|embed_in|wte|wpe|shared|relative_attention_bias)"
    r"(_per_layer)?$"
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a `config.json`, or None for an architecture that is not listed."""
    return BY_MODEL_TYPE.get(str(config.get("model_type")))


def is_embedding(module: str) -> bool:
    return _EMBEDDING.search(module) is not None


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether `config.json` describes a mixture of experts, also one beside a vision tower."""
    nested = config.get("text_config")
    named = any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))
    return named or (isinstance(nested, dict) and is_mixture(nested))


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Number of tokens that a model knows; None for one that reads no text."""
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return int(size) if isinstance(size, int) else None


def module_names(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint key -> the name of that parameter in the model class that `config` names.

    A hub checkpoint of GPT-2 says `h.0.ln_1.weight`, the model in memory `transformer.h.0.ln_1.weight`: an adapter needs the
    latter. Keys of a bare backbone (`BertModel`) keep no prefix, as in memory.
    """
    keys = list(keys)
    family = family_of(config)
    prefix = f"{family.prefix}." if family and family.prefix else ""
    architecture = str((config.get("architectures") or [""])[0])
    with_head = not architecture.endswith("Model") or architecture.endswith(_MODELS_WITH_HEAD)
    names = {}
    for key in keys:
        name = in_memory(key, family) if family else loaded_name(key, config) or key
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # checkpoints from before 2020
        names[key] = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    if prefix and with_head and config and not any(name.startswith(prefix) for name in names.values()):
        return {key: name if is_head(name) else prefix + name for key, name in names.items()}
    return names


def in_memory(name: str, family: Family | None) -> str:
    """A name as releases of the model class have it today, by the renames of its family."""
    for pattern, replacement in family.renames if family else ():
        name = re.sub(pattern, replacement, name)
    return name


def is_head(name: str) -> bool:
    """Whether a parameter, or a module, lies outside the backbone."""
    return name.removesuffix(".weight").removesuffix(".bias") == "decoder" or name.split(".")[0] in (
        *("lm_head", "classifier", "score", "cls", "qa_outputs", "pooler", "embed_out", "head", "predictions", "proj_out"),
        *("vocab_projector", "vocab_transform", "vocab_layer_norm", "pre_classifier", "final_logits_bias", "output_projection"),
        *("generator_predictions", "generator_lm_head", "discriminator_predictions"),
    )


_MODELS_WITH_HEAD = ("HeadModel", "HeadsModel", "MTModel")  # GPT2LMHeadModel, MarianMTModel
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "MTModel")


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether the model class of `config.json` has an output head over the vocabulary."""
    return str((config.get("architectures") or ["ForCausalLM"])[0]).endswith(_LANGUAGE_MODELS)


def aliases_of(name: str, family: Family | None, config: Mapping[str, Any]) -> list[str]:
    """The parameters that share the value of `name` in the model class of `config` without being stored on their own."""
    if family is None:
        return []
    has_head = is_language_model(config)
    short = without_prefix(name, family)
    return [alias for alias, owner in family.tied.items() if without_prefix(owner, family) == short and (has_head or not is_head(alias))]


def without_prefix(name: str, family: Family | None) -> str:
    """The name as the bare backbone knows it, by which two checkpoints of different heads are matched."""
    return name.removeprefix(f"{family.prefix}.") if family and family.prefix else name


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: `block` names the kind of block (its path), `layer` counts along the network."""

    role: str
    block: int
    layer: int


def place_of(module: str, family: Family) -> Place | None:
    """Role and layer of a module, or None when it is none of the family's listed matrices."""
    for number, block in enumerate(family.blocks):
        head, tail = block.path.split("{}")
        short = without_prefix(head, family)  # a bare backbone has no prefix in memory
        match = re.match(rf"({re.escape(head)}|{re.escape(short)})(\d+){re.escape(tail)}\.(.+)$", module)
        if match:
            for role, paths in block.roles.items():
                if match[3] in paths.split("|"):
                    return Place(role, number, int(match[2]))
    return None


@dataclass(frozen=True)
class Heads:
    """Attention geometry: query heads, key/value heads and their size."""

    query: int
    key_value: int
    size: int


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """Attention geometry from `config.json`, of the language model where there are several, or None when it does not say."""
    nested = config.get("text_config")
    config = {**config, **nested} if isinstance(nested, dict) else config

    def first(*names: str) -> int | None:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)

    query = first("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    if not query:
        return None
    size = first("head_dim", "d_kv") or (hidden // query if hidden else None)
    one = config.get("multi_query") and not config.get("new_decoder_architecture")  # Falcon's second form overrules its first
    return Heads(query, 1 if one else first("num_key_value_heads", "num_kv_heads") or query, size) if size else None
