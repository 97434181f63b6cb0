"""One tiny model for each entry of the architecture table, as sizes for its configuration class."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

_TEXT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = _TEXT | _SIZE | {"num_key_value_heads": 2, "tie_word_embeddings": False}
_ENCODER = _TEXT | _SIZE | {"max_position_embeddings": 64}
_HEAD = {"head_dim": 8}
_MOE = _GQA | {"num_experts_per_tok": 2}
_QWEN_MOE = _MOE | {"num_experts": 4, "moe_intermediate_size": 24}
_BART = _TEXT | {
    "d_model": 32,
    **{
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
    },
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = _TEXT | {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}

CAUSAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "olmo", "olmo2", "stablelm", "cohere", "granite", "starcoder2"), _GQA),
    "qwen3": _GQA | _HEAD,
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GQA | _HEAD),
    "phi": _GQA,
    "phi3": _GQA,
    "mixtral": _MOE | {"num_local_experts": 4},
    "qwen2_moe": _QWEN_MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": _QWEN_MOE | _HEAD,
    "olmoe": _MOE | {"num_experts": 4},
    "gpt_oss": _MOE | _HEAD | {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt_neox": _TEXT | _SIZE | {"tie_word_embeddings": False},
    "bloom": _TEXT | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": _TEXT | _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
MASKED: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "distilbert": _TEXT | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {"bart": _BART, "mbart": _BART, "t5": _T5, "mt5": _T5}
IMAGES: dict[str, dict[str, Any]] = {"vit": _SIZE | {"image_size": 16, "patch_size": 8, "num_labels": 3}}
_SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_QWEN_SIGHT = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_QWEN_SIGHT |= {"intermediate_size": 24, "out_hidden_size": 32}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_QWEN_VL = {"text_config": _GQA | _MROPE, "vision_config": _QWEN_SIGHT, "tie_word_embeddings": False}
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "llava": {"text_config": _GQA | {"model_type": "llama"}, "vision_config": _SIGHT | {"model_type": "clip_vision_model"}},
    "gemma3": {
        "text_config": _GQA | _HEAD | {"model_type": "gemma3_text"},
        "vision_config": _SIGHT | {"model_type": "siglip_vision_model"},
    },
}
_CLASSES = (
    (AutoModelForCausalLM, CAUSAL),
    (AutoModelForMaskedLM, MASKED),
    (AutoModelForSeq2SeqLM, SEQ2SEQ),
    (AutoModelForImageClassification, IMAGES),
    (AutoModelForImageTextToText, SEEING),
)
TINY = {name: (auto, sizes) for auto, family in _CLASSES for name, sizes in family.items()}


def tiny(model_type: str, **overrides: Any) -> tuple[type, Any]:
    """The model class of a listed type, and its tiny configuration."""
    auto, sizes = TINY[model_type]
    config = AutoConfig.for_model(model_type, **{**sizes, **overrides})
    return auto._model_mapping[type(config)], config
