"""The architecture table: model families as data, one entry each.

Adding a family is one entry here and one tiny model in `tests/families.py`. An architecture that is not listed still converts with
`--to lora`, where every two-dimensional weight is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
WRITERS = ("o", "down")  # add to the residual stream; every other role reads from it
# Fused weights and the logical matrices in their output rows, in order; with `qkv_heads` that order repeats head by head.
FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "qkv_heads": ("q", "k", "v"), "gate_up": ("gate", "up")}
NormKind = Literal["rms", "gemma", "layer"]


@dataclass(frozen=True)
class Block:
    """One repeated block: `path` has `{}` for the layer number; `roles` maps a role, or a fused one, to its module below `path`.

    Where releases named a module differently, the names stand side by side: `wi_1|wi`.
    """

    path: str
    roles: Mapping[str, str]

    def __post_init__(self) -> None:
        unknown = set(self.roles) - {*ATTENTION_ROLES, *MLP_ROLES, *FUSED}
        if unknown or self.path.count("{}") != 1:
            raise ValueError(f"{self.path}: needs one {{}} for the layer number and known roles; unknown: {sorted(unknown)}")


@dataclass(frozen=True)
class Stream:
    """The residual stream of a family's first block, as LatTE needs it.

    `norms` leads from a norm below the block to the roles that read its output; the key is empty where they read the stream as it is.
    `kind` says how a gain acts: `rms` multiplies by the weight, `gemma` by one plus the weight, `layer` also subtracts the mean and
    adds a bias. `post_norms` are those that follow the writers' additions, in order, of encoders that normalise the stream itself;
    no `final` norm is left then.
    """

    norms: Mapping[str, tuple[str, ...]]
    final: str
    kind: NormKind
    post_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Attention without rotary embeddings, as LatTE's score construction needs it: the module below the first block whose attribute
    `size` holds the head size."""

    owner: str
    size: str = "head_dim"


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, in one of two forms.

    `modules`: every expert's matrices are tensors of their own on disk, `path` with `{}` for the layer and for the expert, and are
    the names of gate, up and down below it; `transformers` stacks them in memory under `stacked`, as `gate_up_proj` and `down_proj`,
    and PEFT takes adapters by the names on disk; all but `by_parameter`, whose targets it has to be told as the parameters that they
    become. Without `modules` they are stacked on disk as in memory, as the `parameters` of
    `stacked`, in the order of the model class; `transposed` says that such a stack is `(experts, in, out)`.
    `router` is the module below the layer that chooses among them.
    """

    stacked: str
    router: str
    path: str = ""
    modules: tuple[str, str, str] | None = None
    parameters: tuple[str, ...] = ()
    transposed: bool = False
    by_parameter: bool = False

    def __post_init__(self) -> None:
        if (self.modules is None) == (not self.parameters) or bool(self.modules) != bool(self.path):
            raise ValueError(f"{self.stacked}: give either modules with a path, or parameters")


@dataclass(frozen=True)
class Family:
    """One model family, in the names of its modules in memory (transformers 5).

    `prefix` is the attribute that holds the backbone in a model with a head; `tied` leads from a parameter that checkpoints
    leave out to the one whose value it shares; `renames` lead from names on disk, or of other releases, to names in memory;
    `conv1d` says that weights are stored `(in, out)`. `rotary` and `why_no_latte` explain what LatTE refuses.
    """

    model_types: tuple[str, ...]
    prefix: str
    blocks: tuple[Block, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False
    experts: Experts | None = None
    stream: Stream | None = None
    score: Score | None = None
    rotary: bool = False
    why_no_latte: str = ""


_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
_INNER_HEAD = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
_QKV = {role: f"self_attn.{role}_proj" for role in ("q", "k", "v")}
_ATTENTION = {**_QKV, "o": "self_attn.o_proj"}
_MLP = {role: f"mlp.{role}_proj" for role in MLP_ROLES}
_LLAMA_NORMS = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}
_BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_BERT_STREAM = Stream({"": ("q", "k", "v", "up")}, "", "layer", post_norms=("attention.output.LayerNorm", "output.LayerNorm"))
_BERT_SCORE = Score("attention.self", size="attention_head_size")

_LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    prefix="model",
    blocks=(Block("model.layers.{}", {**_ATTENTION, **_MLP}),),
    tied=_HEAD,
    stream=Stream(_LLAMA_NORMS, "model.norm", "rms"),
    rotary=True,
)
_MIXTURE = Family(  # the entries below say which; only the attention has roles, as experts are no part of a common tensor
    model_types=(),
    prefix="model",
    blocks=(Block("model.layers.{}", _ATTENTION),),
    tied=_HEAD,
    rotary=True,
)
_BY_EXPERT = Experts(
    stacked="mlp.experts",
    router="mlp.gate",
    path="model.layers.{}.mlp.experts.{}",
    modules=("gate_proj", "up_proj", "down_proj"),
)


def _bart_layer(path: str) -> Block:
    return Block(path, {**_QKV, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"})


def _t5_attention(path: str) -> Block:
    return Block(path, {role: role for role in ATTENTION_ROLES})


def _t5_mlp(path: str) -> Block:
    return Block(path, {"gate": "wi_0", "up": "wi_1|wi", "down": "wo"})


FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    replace(_LLAMA, model_types=("gemma",), stream=Stream(_LLAMA_NORMS, "model.norm", "gemma")),
    replace(
        _LLAMA,
        model_types=("gemma2", "gemma3_text", "olmo2"),
        stream=None,
        why_no_latte="it normalises what its writers add, and that norm depends on more than the carried dims",
    ),
    replace(_LLAMA, model_types=("olmo", "stablelm", "cohere", "granite"), stream=None),
    replace(  # a language model beside a vision tower, which has no roles: other widths, no part of a common tensor
        _LLAMA,
        model_types=("qwen2_vl", "qwen2_5_vl"),
        blocks=(Block("model.language_model.layers.{}", {**_ATTENTION, **_MLP}),),
        tied=_INNER_HEAD,
        renames=((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")),
        stream=None,
    ),
    replace(
        _LLAMA,
        model_types=("llava", "gemma3"),
        blocks=(Block("model.language_model.layers.{}", {**_ATTENTION, **_MLP}),),
        tied=_INNER_HEAD,
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        ),
        stream=None,
    ),
    Family(
        model_types=("starcoder2",),
        prefix="model",
        blocks=(Block("model.layers.{}", {**_ATTENTION, "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        tied=_HEAD,
        rotary=True,
    ),
    Family(
        model_types=("phi",),
        prefix="model",
        blocks=(Block("model.layers.{}", {**_QKV, "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}),),
        tied=_HEAD,
        rotary=True,
    ),
    Family(
        model_types=("phi3",),
        prefix="model",
        blocks=(
            Block(
                "model.layers.{}",
                {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
            ),
        ),
        tied=_HEAD,
        stream=Stream({"input_layernorm": ("qkv",), "post_attention_layernorm": ("gate_up",)}, "model.norm", "rms"),
        rotary=True,
    ),
    replace(
        _MIXTURE,
        model_types=("mixtral",),
        renames=((r"\.block_sparse_moe\.gate\.", ".mlp.gate."),),
        experts=replace(_BY_EXPERT, path="model.layers.{}.block_sparse_moe.experts.{}", modules=("w1", "w3", "w2")),
    ),
    replace(_MIXTURE, model_types=("qwen3_moe", "olmoe"), experts=_BY_EXPERT),
    replace(_MIXTURE, model_types=("qwen2_moe",), experts=replace(_BY_EXPERT, by_parameter=True)),
    replace(
        _MIXTURE,
        model_types=("gpt_oss",),
        experts=Experts(
            stacked="mlp.experts",
            router="mlp.router",
            parameters=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
            transposed=True,
        ),
    ),
    Family(
        model_types=("gpt_neox",),
        prefix="gpt_neox",
        blocks=(
            Block(
                "gpt_neox.layers.{}",
                {
                    "qkv_heads": "attention.query_key_value",
                    "o": "attention.dense",
                    "up": "mlp.dense_h_to_4h",
                    "down": "mlp.dense_4h_to_h",
                },
            ),
        ),
        tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
        renames=((r"^embed_out\.", "lm_head."),),
        rotary=True,
    ),
    Family(
        model_types=("bloom",),
        prefix="transformer",
        blocks=(
            Block(
                "transformer.h.{}",
                {
                    "qkv_heads": "self_attention.query_key_value",
                    "o": "self_attention.dense",
                    "up": "mlp.dense_h_to_4h",
                    "down": "mlp.dense_4h_to_h",
                },
            ),
        ),
        tied={"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
    # Releases of Falcon interleave q, k and v in three ways, so no roles; listed for the head that shares the embedding's weight.
    Family(("falcon",), "transformer", blocks=(), tied={"lm_head.weight": "transformer.word_embeddings.weight"}, rotary=True),
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
        stream=Stream({"": ("q", "k", "v", "up")}, "", "layer", post_norms=("sa_layer_norm", "output_layer_norm")),
    ),
    Family(
        model_types=("opt",),
        prefix="model",
        blocks=(_bart_layer("model.decoder.layers.{}"),),
        tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
        stream=Stream({"self_attn_layer_norm": ("q", "k", "v"), "final_layer_norm": ("up",)}, "model.decoder.final_layer_norm", "layer"),
        score=Score("self_attn"),
    ),
    Family(
        model_types=("gpt2",),
        prefix="transformer",
        blocks=(Block("transformer.h.{}", {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        tied={"lm_head.weight": "transformer.wte.weight"},
        conv1d=True,
        stream=Stream({"ln_1": ("qkv",), "ln_2": ("up",)}, "transformer.ln_f", "layer"),
        score=Score("attn"),
    ),
    Family(
        model_types=("bert",),
        prefix="bert",
        blocks=(Block("bert.encoder.layer.{}", _BERT_ROLES),),
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        stream=_BERT_STREAM,
        score=_BERT_SCORE,
    ),
    Family(
        model_types=("roberta", "xlm-roberta"),
        prefix="roberta",
        blocks=(Block("roberta.encoder.layer.{}", _BERT_ROLES),),
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        stream=_BERT_STREAM,
        score=_BERT_SCORE,
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
        stream=Stream({"layernorm_before": ("q", "k", "v"), "layernorm_after": ("up",)}, "vit.layernorm", "layer"),
        score=Score("attention"),
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
BY_MODEL_TYPE: Mapping[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
