"""What the project knows of model families: one entry each, data only.

An architecture that is not listed still converts with `--to lora`, where every two-dimensional weight is a matrix of its own;
LoRTA needs to know which matrix is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
WRITERS = ("o", "down")  # add to the residual stream; every other role reads from it

# A module of this last name is an embedding table, in known and unknown architectures alike.
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|embed_in|wte|wpe|shared|embeddings?|word_embeddings|position_embeddings"
    r"|token_type_embeddings|relative_attention_bias)$"
)


@dataclass(frozen=True)
class Block:
    """One repeated block: `path` has `{}` for the layer number; `roles` maps a role to its module below `path`.

    The role `qkv` is a fused matrix whose output rows are q, then k, then v.
    """

    path: str
    roles: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One model family, in the names of its modules in memory (transformers 5).

    `prefix` is the attribute that holds the backbone in a model with a head; `tied` leads from a parameter that checkpoints
    leave out to the one whose value it shares; `renames` lead from names on disk to names in memory; `conv1d` says that
    weights are stored `(in, out)`.
    """

    model_types: tuple[str, ...]
    prefix: str
    blocks: tuple[Block, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False


_LLAMA_ROLES = {
    **{role: f"self_attn.{role}_proj" for role in ATTENTION_ROLES},
    **{role: f"mlp.{role}_proj" for role in MLP_ROLES},
}
_BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def _bart_layer(path: str) -> Block:
    attention = {**{role: f"self_attn.{role}_proj" for role in ("q", "k", "v")}, "o": "self_attn.out_proj"}
    return Block(path, {**attention, "up": "fc1", "down": "fc2"})


def _t5_attention(path: str) -> Block:
    return Block(path, {role: role for role in ATTENTION_ROLES})


def _t5_mlp(path: str) -> Block:
    return Block(path, {"gate": "wi_0", "up": "wi_1|wi", "down": "wo"})


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=(
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo", "olmo2"),
            *("stablelm", "cohere", "granite", "starcoder2"),
        ),
        prefix="model",
        blocks=(Block("model.layers.{}", _LLAMA_ROLES),),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    Family(
        model_types=("phi",),
        prefix="model",
        blocks=(
            Block(
                "model.layers.{}",
                {
                    **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v")},
                    "o": "self_attn.dense",
                    "up": "mlp.fc1",
                    "down": "mlp.fc2",
                },
            ),
        ),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    Family(
        model_types=("phi3",),
        prefix="model",
        blocks=(Block("model.layers.{}", {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"}),),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    ),
    # Their fused q, k and v are interleaved by heads, so no LoRTA; listed for the head that shares the embedding's weight.
    Family(
        model_types=("gpt_neox",),
        prefix="gpt_neox",
        blocks=(),
        tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
        renames=((r"^embed_out\.", "lm_head."),),
    ),
    Family(("falcon", "bloom"), "transformer", blocks=(), tied={"lm_head.weight": "transformer.word_embeddings.weight"}),
    Family(
        model_types=("bart", "mbart"),
        prefix="model",
        blocks=(
            _bart_layer("model.encoder.layers.{}"),
            _bart_layer("model.decoder.layers.{}"),
            Block(
                "model.decoder.layers.{}",
                {**{r: f"encoder_attn.{r}_proj" for r in ("q", "k", "v")}, "o": "encoder_attn.out_proj"},
            ),
        ),
        tied={
            "model.encoder.embed_tokens.weight": "model.shared.weight",
            "model.decoder.embed_tokens.weight": "model.shared.weight",
            "lm_head.weight": "model.shared.weight",
        },
    ),
    Family(
        model_types=("distilbert",),
        prefix="distilbert",
        blocks=(
            Block(
                "distilbert.transformer.layer.{}",
                {**{r: f"attention.{r}_lin" for r in ("q", "k", "v")}, "o": "attention.out_lin", "up": "ffn.lin1", "down": "ffn.lin2"},
            ),
        ),
        tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ),
    Family(
        model_types=("opt",),
        prefix="model",
        blocks=(_bart_layer("model.decoder.layers.{}"),),
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    ),
    Family(
        model_types=("gpt2",),
        prefix="transformer",
        blocks=(Block("transformer.h.{}", {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        tied={"lm_head.weight": "transformer.wte.weight"},
        conv1d=True,
    ),
    Family(
        model_types=("bert",),
        prefix="bert",
        blocks=(Block("bert.encoder.layer.{}", _BERT_ROLES),),
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    Family(
        model_types=("roberta", "xlm-roberta"),
        prefix="roberta",
        blocks=(Block("roberta.encoder.layer.{}", _BERT_ROLES),),
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
    ),
    Family(
        model_types=("vit",),
        prefix="vit",
        blocks=(
            Block(
                "vit.layers.{}",
                {**{r: f"attention.{r}_proj" for r in ATTENTION_ROLES}, "up": "mlp.fc1", "down": "mlp.fc2"},
            ),
        ),
        renames=(
            (r"encoder\.layer\.", "layers."),
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ),
    ),
    Family(
        model_types=("t5", "mt5"),
        prefix="",
        blocks=(
            _t5_attention("encoder.block.{}.layer.0.SelfAttention"),
            _t5_attention("decoder.block.{}.layer.0.SelfAttention"),
            _t5_attention("decoder.block.{}.layer.1.EncDecAttention"),
            _t5_mlp("encoder.block.{}.layer.1.DenseReluDense"),
            _t5_mlp("decoder.block.{}.layer.2.DenseReluDense"),
        ),
        tied={f"{module}.weight": "shared.weight" for module in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    ),
)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a `config.json`, or None for an architecture that is not listed."""
    return _BY_MODEL_TYPE.get(str(config.get("model_type")))


def is_embedding(module: str) -> bool:
    return _EMBEDDING.search(module) is not None


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether `config.json` describes a mixture of experts."""
    return any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))


def module_names(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint key -> the name of that parameter in the model class that `config` names.

    A hub checkpoint of GPT-2 says `h.0.ln_1.weight`, the model in memory `transformer.h.0.ln_1.weight`: an adapter needs the
    latter. Keys of a bare backbone (`BertModel`) keep no prefix, as in memory.
    """
    keys = list(keys)
    family = family_of(config)
    renames = [(re.compile(a), b) for a, b in family.renames] if family else []
    prefix = f"{family.prefix}." if family and family.prefix else ""
    architecture = str((config.get("architectures") or [""])[0])
    with_head = not architecture.endswith("Model") or architecture.endswith(("HeadModel", "HeadsModel"))  # GPT2LMHeadModel
    add_prefix = bool(prefix) and with_head and bool(config) and not any(key.startswith(prefix) for key in keys)
    names = {}
    for key in keys:
        name = key
        for pattern, replacement in renames:
            name = pattern.sub(replacement, name)
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # checkpoints from before 2020
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        names[key] = prefix + name if add_prefix and not is_head(name) else name
    return names


def is_head(name: str) -> bool:
    """Whether a parameter lies outside the backbone."""
    return name.split(".")[0] in (
        *("lm_head", "classifier", "score", "cls", "qa_outputs", "pooler", "embed_out"),
        *("vocab_projector", "vocab_transform", "vocab_layer_norm", "pre_classifier", "final_logits_bias"),
    )


_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


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
    """Attention geometry from `config.json`, or None when it does not say."""

    def first(*names: str) -> int | None:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)

    query = first("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    if not query:
        return None
    size = first("head_dim", "d_kv") or (hidden // query if hidden else None)
    return Heads(query, first("num_key_value_heads") or query, size) if size else None
