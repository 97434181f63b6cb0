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
    AutoModelForSpeechSeq2Seq,
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

_DEEPSEEK = _MOE | {
    **{
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
}
_LINEAR = (
    _HEAD
    | {"layer_types": ["linear_attention", "full_attention"]}
    | {
        f"linear_{name}": size
        for name, size in {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8, "conv_kernel_dim": 4}.items()
    }
)
_ANY_MOE = {name: size for name, size in _DEEPSEEK.items() if "lora" not in name and "head_dim" not in name}
_ANY_MOE |= _HEAD | {"num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4}
_MAMBA = _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "tie_word_embeddings": False}
_GPT = _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CAUSAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "olmo", "olmo2", "stablelm", "cohere", "granite", "starcoder2"), _GQA),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "helium", "seed_oss", "ernie4_5", "hunyuan_v1_dense"), _GQA | _HEAD),
    **dict.fromkeys(("cohere2", "ministral", "ministral3", "cwm", "diffllama", "olmo3", "exaone4", "glm", "glm4"), _GQA | _HEAD),
    **dict.fromkeys(("arcee", "apertus", "nemotron", "jais2"), _GQA | _HEAD),
    "qwen3_5_text": _GQA | _LINEAR,
    "lfm2": _GQA | {"layer_types": ["conv", "full_attention"]},
    "phi": _GQA,
    "phi3": _GQA,
    "persimmon": _TEXT | _SIZE | {"tie_word_embeddings": False},
    "minicpm3": {key: value for key, value in _DEEPSEEK.items() if "exp" not in key} | {"head_dim": 4},
    "mixtral": _MOE | {"num_local_experts": 4},
    "minimax_m2": _MOE | _HEAD | {"num_local_experts": 4},
    "phimoe": _MOE | {"num_local_experts": 4},
    "qwen2_moe": _QWEN_MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": _QWEN_MOE | _HEAD,
    "qwen3_next": _QWEN_MOE | _LINEAR | {"shared_expert_intermediate_size": 40},
    **dict.fromkeys(("olmoe", "flex_olmo"), _MOE | {"num_experts": 4}),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _DEEPSEEK | {"head_dim": 4}),
    **dict.fromkeys(("dots1", "glm4_moe"), _DEEPSEEK | _HEAD),
    **dict.fromkeys(("afmoe", "cohere2_moe", "mellum", "solar_open"), _ANY_MOE),
    "beam": _ANY_MOE | {"mlp_layer_types": ["dense", "sparse"]},
    "hunyuan_v1_moe": _ANY_MOE | {"moe_topk": 2},
    "minimax": _ANY_MOE | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": _MOE
    | {"intermediate_size": 24}
    | {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "exaone_moe": _QWEN_MOE | _HEAD | {"num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": _GQA | _HEAD | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "granitemoe": _MOE | {"num_local_experts": 4},
    "granitemoeshared": _MOE | {"num_local_experts": 4, "shared_intermediate_size": 40},
    "llama4_text": _MOE | _HEAD | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "gpt_oss": _MOE | _HEAD | {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "gpt_neox": _TEXT | _SIZE | {"tie_word_embeddings": False},
    "bloom": _TEXT | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": _TEXT | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neo": _TEXT | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_bigcode": _GPT,
    "xglm": _TEXT | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
    "biogpt": _ENCODER,
    "opt": _TEXT | _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": _GPT,
    "openai-gpt": _GPT,
    **dict.fromkeys(("mamba", "falcon_mamba"), _MAMBA),
    "mamba2": _MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
    "nemotron_h": _GQA
    | _HEAD
    | {"layers_block_type": ["mamba", "attention"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2}
    | {"chunk_size": 4},
    "falcon_h1": _GQA
    | _HEAD
    | {f"mamba_{k}": n for k, n in {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8, "chunk_size": 4}.items()},
    "modernbert-decoder": _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "tie_word_embeddings": False},
}
MASKED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "deberta-v2", "mpnet"), _ENCODER),
    "distilbert": _TEXT | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "electra": _ENCODER | {"embedding_size": 16},
    "albert": _ENCODER | {"embedding_size": 16, "num_hidden_groups": 2},
    "modernbert": _ENCODER | {"cls_token_id": 1, "sep_token_id": 2},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "mbart", "pegasus", "m2m_100", "blenderbot"), _BART),
    "marian": _BART | {"decoder_vocab_size": 96},
    "t5": _T5,
    "mt5": _T5,
}
SPEECH: dict[str, dict[str, Any]] = {"whisper": _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}}
IMAGES: dict[str, dict[str, Any]] = {"vit": _SIZE | {"image_size": 16, "patch_size": 8, "num_labels": 3}}
_SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_QWEN_SIGHT = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_QWEN_SIGHT |= {"intermediate_size": 24, "out_hidden_size": 32}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_QWEN_VL = {"text_config": _GQA | _MROPE, "vision_config": _QWEN_SIGHT, "tie_word_embeddings": False}
_LLAMA_AND = {"text_config": _GQA | {"model_type": "llama"}, "tie_word_embeddings": False}
_CLIP_SIGHT = _SIGHT | {"model_type": "clip_vision_model"}
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL
    | {
        "text_config": _GQA | _HEAD | _MROPE,
        "vision_config": _QWEN_SIGHT | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
    },
    "llava_next": _LLAMA_AND | {"vision_config": _CLIP_SIGHT},
    "mistral3": _LLAMA_AND | {"text_config": _GQA | {"model_type": "mistral"}, "vision_config": _SIGHT | {"model_type": "pixtral"}},
    "paligemma": {
        "text_config": _GQA | _HEAD | {"model_type": "gemma"},
        "vision_config": _SIGHT | {"model_type": "siglip_vision_model"},
        "projection_dim": 32,
    },
    "internvl": _LLAMA_AND | {"text_config": _GQA | {"model_type": "qwen2"}, "vision_config": _SIGHT | {"model_type": "internvl_vision"}},
    **dict.fromkeys(("idefics3", "smolvlm"), _LLAMA_AND | {"vision_config": _SIGHT, "scale_factor": 2}),
    "llama4": {
        "text_config": CAUSAL["llama4_text"],
        "vision_config": _SIGHT | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "intermediate_size": 64},
    },
    "qwen2_5_vl": _QWEN_VL,
    "llava": _LLAMA_AND | {"vision_config": _CLIP_SIGHT},
    "gemma3": {
        "text_config": _GQA | _HEAD | {"model_type": "gemma3_text"},
        "vision_config": _SIGHT | {"model_type": "siglip_vision_model"},
    },
}
_CLASSES = (
    (AutoModelForCausalLM, CAUSAL),
    (AutoModelForMaskedLM, MASKED),
    (AutoModelForSeq2SeqLM, SEQ2SEQ),
    (AutoModelForSpeechSeq2Seq, SPEECH),
    (AutoModelForImageClassification, IMAGES),
    (AutoModelForImageTextToText, SEEING),
)
TINY = {name: (auto, sizes) for auto, family in _CLASSES for name, sizes in family.items()}


def tiny(model_type: str, **overrides: Any) -> tuple[type, Any]:
    """The model class of a listed type, and its tiny configuration."""
    auto, sizes = TINY[model_type]
    config = AutoConfig.for_model(model_type, **{**sizes, **overrides})
    return auto._model_mapping[type(config)], config
