"""Where LatTE's expansion acts in each supported architecture: which norm feeds which readers, and which matrices write.

The residual-stream construction needs to know the norm before every reader, because the norm's gain is folded into the
reader's effective delta, and needs each block to be `h + writer(...)`, with nothing in between or, after that, a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapt_convert.formats.errors import AdaptError

NormKind = Literal["rms", "gemma", "layer"]


@dataclass(frozen=True)
class Layout:
    """One architecture, in the names of its modules in memory.

    `block` has `{}` for the layer number; `readers` leads from a norm to the matrices that read its output, `writers` are the
    matrices that add to the residual stream, all below `block`. `norm` says how a gain acts: `rms` multiplies by the weight,
    `gemma` by one plus the weight, `layer` also subtracts the mean and adds a bias.
    `post_norms` are the norms that follow the writers' additions, in order, of encoders that normalise the stream itself: their
    readers read the stream as it is, so no gain is folded (the key of `readers` is empty) and no norm is left at the end.
    """

    block: str
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final_norm: str
    norm: NormKind
    conv1d: bool = False
    post_norms: tuple[str, ...] = ()

    @property
    def layers(self) -> str:
        """The path of the list of layers."""
        return self.block.removesuffix(".{}")


_ATTENTION = tuple(f"self_attn.{role}_proj" for role in "qkv")
_BERT_SELF = "attention.self"
_BERT_INPUTS = tuple(f"{_BERT_SELF}.{name}" for name in ("query", "key", "value"))
_VIT_INPUTS = tuple(f"attention.{role}_proj" for role in "qkv")
_LLAMA_READERS = {"input_layernorm": _ATTENTION, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
_LLAMA_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_LLAMA = Layout("model.layers.{}", _LLAMA_READERS, _LLAMA_WRITERS, "model.norm", "rms")
_GEMMA = Layout("model.layers.{}", _LLAMA_READERS, _LLAMA_WRITERS, "model.norm", "gemma")
_GPT2 = Layout(
    "transformer.h.{}",
    {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    ("attn.c_proj", "mlp.c_proj"),
    "transformer.ln_f",
    "layer",
    conv1d=True,
)
_OPT = Layout(
    "model.decoder.layers.{}",
    {"self_attn_layer_norm": _ATTENTION, "final_layer_norm": ("fc1",)},
    ("self_attn.out_proj", "fc2"),
    "model.decoder.final_layer_norm",
    "layer",
)

_VIT = Layout(
    "vit.layers.{}",
    {"layernorm_before": _VIT_INPUTS, "layernorm_after": ("mlp.fc1",)},
    ("attention.o_proj", "mlp.fc2"),
    "vit.layernorm",
    "layer",
)


def _bert(encoder: str) -> Layout:
    readers = (*_BERT_INPUTS, "intermediate.dense")
    writers = ("attention.output.dense", "output.dense")
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    return Layout(f"{encoder}.encoder.layer.{{}}", {"": readers}, writers, "", "layer", post_norms=norms)


_DISTILBERT = Layout(
    "distilbert.transformer.layer.{}",
    {"": (*(f"attention.{role}_lin" for role in "qkv"), "ffn.lin1")},
    ("attention.out_lin", "ffn.lin2"),
    "",
    "layer",
    post_norms=("sa_layer_norm", "output_layer_norm"),
)

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "gemma": _GEMMA,
    "gpt2": _GPT2,
    "opt": _OPT,
    "vit": _VIT,
    "bert": _bert("bert"),
    **dict.fromkeys(("roberta", "xlm-roberta"), _bert("roberta")),
    "distilbert": _DISTILBERT,
}
_ROTARY = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")
_WHY_NOT = {
    "gemma2": "it normalises what its writers add, and that norm depends on more than the carried dims",
    "gemma3_text": "it normalises what its writers add, and that norm depends on more than the carried dims",
    "olmo2": "it normalises what its writers add, and that norm depends on more than the carried dims",
}


def layout_of(config: Mapping[str, Any], origin: str) -> Layout:
    """The layout of a `config.json`. Raises `AdaptError` that names what is supported, for any other architecture."""
    model_type = str(config.get("model_type"))
    layout = LAYOUTS.get(model_type)
    reason = _WHY_NOT.get(model_type, "") or _variant_reason(model_type, config)
    if layout is None or reason:
        why = f" ({reason})" if reason else ""
        raise AdaptError(f"{origin}: LatTE does not support {model_type}{why}; supported: {', '.join(LAYOUTS)}; use --to lora")
    return layout


def _variant_reason(model_type: str, config: Mapping[str, Any]) -> str:
    if model_type == "opt" and not config.get("do_layer_norm_before", True):
        return "this one normalises after its residual additions"
    if model_type == "opt" and config.get("_remove_final_layer_norm"):
        return "this one has no final norm"
    if config.get("add_cross_attention"):
        return "this one has cross-attention"
    return ""


@dataclass(frozen=True)
class ScoreLayout:
    """The attention of one architecture without rotary embeddings, for the score construction.

    `inputs` are q, k and v below `block`, or one fused matrix of all three; `output` is o. `owner` is the module whose attribute
    `size` holds the head size and, in GPT-2, `split_size` that of all heads.
    """

    block: str
    inputs: tuple[str, ...]
    output: str
    owner: str
    size: str = "head_dim"
    conv1d: bool = False

    @property
    def layers(self) -> str:
        """The path of the list of layers."""
        return self.block.removesuffix(".{}")


SCORE_LAYOUTS: dict[str, ScoreLayout] = {
    "gpt2": ScoreLayout("transformer.h.{}", ("attn.c_attn",), "attn.c_proj", "attn", conv1d=True),
    "opt": ScoreLayout("model.decoder.layers.{}", _ATTENTION, "self_attn.out_proj", "self_attn"),
    "bert": ScoreLayout("bert.encoder.layer.{}", _BERT_INPUTS, "attention.output.dense", _BERT_SELF, "attention_head_size"),
    **dict.fromkeys(
        ("roberta", "xlm-roberta"),
        ScoreLayout("roberta.encoder.layer.{}", _BERT_INPUTS, "attention.output.dense", _BERT_SELF, "attention_head_size"),
    ),
    "vit": ScoreLayout("vit.layers.{}", _VIT_INPUTS, "attention.o_proj", "attention"),
}


def score_layout_of(config: Mapping[str, Any], origin: str) -> ScoreLayout:
    """The layout of a `config.json`. Raises `AdaptError`: with rotary embeddings the construction does not hold."""
    model_type = str(config.get("model_type"))
    if model_type in SCORE_LAYOUTS:
        return SCORE_LAYOUTS[model_type]
    if model_type in _ROTARY:
        raise AdaptError(
            f"--construction score: {model_type} rotates queries and keys after their product with the weights, so the low-rank part "
            "of a score is no product of expanded heads; use --construction residual, which is exact with rotary embeddings"
        )
    raise AdaptError(f"{origin}: --construction score does not support {model_type}; supported: {', '.join(SCORE_LAYOUTS)}; use --to lora")


def check_latte(config: Mapping[str, Any], origin: str, rank: int | None, segments: int | str | None, construction: str) -> None:
    """Refuse, from `config.json` alone, what a LatTE of this base cannot be. Raises `AdaptError`."""
    if construction == "score":
        score_layout_of(config, origin)
    else:
        layout_of(config, origin)
    width = next((int(config[n]) for n in ("hidden_size", "n_embd", "d_model", "dim") if isinstance(config.get(n), int)), None)
    layers = next((int(config[n]) for n in ("num_hidden_layers", "n_layer", "n_layers") if isinstance(config.get(n), int)), None)
    if rank is not None and width is not None and rank > width:
        raise AdaptError(f"--rank {rank}: the residual stream of {origin} is {width} wide; a basis of it has at most {width} dims")
    if isinstance(segments, int) and layers is not None and segments > layers:
        raise AdaptError(f"--segments {segments}: {origin} has {layers} layers; give at most that many")
