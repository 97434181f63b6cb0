"""Where LatTE's expansion acts in each supported architecture: which norm feeds which readers, and which matrices write.

The residual-stream construction needs to know the norm before every reader, because the norm's gain is folded into the
reader's effective delta, and needs each block to be `h + writer(...)` with nothing in between.
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
    """

    block: str
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final_norm: str
    norm: NormKind
    conv1d: bool = False
    rotary: bool = True

    @property
    def layers(self) -> str:
        """The path of the list of layers."""
        return self.block.removesuffix(".{}")


_ATTENTION = tuple(f"self_attn.{role}_proj" for role in "qkv")
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
    rotary=False,
)
_OPT = Layout(
    "model.decoder.layers.{}",
    {"self_attn_layer_norm": _ATTENTION, "final_layer_norm": ("fc1",)},
    ("self_attn.out_proj", "fc2"),
    "model.decoder.final_layer_norm",
    "layer",
    rotary=False,
)

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "gemma": _GEMMA,
    "gpt2": _GPT2,
    "opt": _OPT,
}
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
    if model_type == "gpt2" and config.get("add_cross_attention"):
        return "this one has cross-attention"
    return ""
