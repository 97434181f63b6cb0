"""Causal language models of transformers that no family lists: all that can be made small, each at full rank.

`--to lora` accounts for every tensor, and what the adapter gives in PEFT is the fine-tune, less what the report names as lost; with
`--strict` such a loss is one line. The listed ones are in test_families.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.families import BY_MODEL_TYPE

# Whichever of these a configuration has.
SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_group": 2, "topk_group": 1},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"use_cache": False, "tie_word_embeddings": False, "is_decoder": True},
}
_ALWAYS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "is_decoder", "tie_word_embeddings")
_LARGE = "has sizes of its own that these do not make small"
_MORE = "wants sizes beside these that agree with each other"
_WHOLE = "is a model of text and images or sound, whose sizes lie in nested configurations"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("bigbird_pegasus", "git", "kimi_linear", "longcat_flash", "mvp", "prophetnet", "roc_bert"), _LARGE),
    **dict.fromkeys(("blt", "gemma4_text"), _LARGE),
    **dict.fromkeys(("axk1", "axk2", "bamba", "codegen", "cohere_compass_text", "dbrx", "deepseek_v32", "dots3_note_text"), _MORE),
    **dict.fromkeys(("gemma3n_text", "gemma4_assistant", "gemma4_unified_assistant", "glm_moe_dsa", "granitemoehybrid", "lfm2_moe"), _MORE),
    **dict.fromkeys(("plbart", "reformer", "xlnet", "xmod", "youtu", "zamba", "zamba2", "zaya"), _MORE),
    **dict.fromkeys(("dots3_note", "emu3", "fuyu", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "mllama"), _WHOLE),
    **dict.fromkeys(("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"), _WHOLE),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), _WHOLE),
    "deepseek_v4": "PEFT adapts its grouped output matrix as a plain one, and fails when it runs",
    "hy_v4": "takes seconds; in PEFT its LoRA was found not to be the fine-tune, and it is not known why",
}
BUILT = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT) - set(BY_MODEL_TYPE))
_MIXTURE = "part of a mixture of experts, in a form that is not known for this architecture"
_JOINED = "joined, cut or turned when transformers loads it"
_RENAMED = "under a name that PEFT would take for an older one"
# The starts of the reasons that a report gives; no other model loses anything.
LOST: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("aria_text", "bailing_hybrid", "granitemoe_swa", "hy_v3", "inkling2_text", "inkling_text", "jetmoe"), (_MIXTURE,)),
    **dict.fromkeys(("kolibri1", "mimo_v2_flash", "minimax_m3_vl_text", "qwen3_5_moe_text", "qwen4_exp_text"), (_MIXTURE,)),
    "laguna": (_MIXTURE, _RENAMED),
    "hrm_text": (_JOINED,),
}


def make(model_type: str) -> tuple[Any, Any]:
    """The class of a model, and its configuration with whichever of `SIZES` it has."""
    config_class = CONFIG_MAPPING[model_type]
    known = {name for parent in config_class.__mro__ for name in getattr(parent, "__annotations__", {})} | set(config_class.attribute_map)
    config = config_class(**{name: value for name, value in SIZES.items() if name in known or name in _ALWAYS})
    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config


def save(directory: Path, model_type: str) -> Pair:
    """A random model and a fine-tune in which every two-dimensional parameter has changed."""
    torch.manual_seed(0)
    model_class, config = make(model_type)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory / "base")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory / "ft")
    return Pair(directory / "base", directory / "ft", model_class, {"input_ids": torch.randint(3, 96, (2, 9)), "use_cache": False})


def without_losses(pair: Pair, rows: dict[str, Any], directory: Path) -> Any:
    """The fine-tune with the base's values of all that was dropped."""
    base, state = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    for row in rows.values():
        if row["status"] == "dropped":
            state |= {key: base[key] for key in row["source_tensors"]}
    directory.mkdir()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_bytes((pair.ft / "config.json").read_bytes())
    return pair.load(directory)


def test_the_lists_name_no_class_that_is_gone_or_listed_elsewhere() -> None:
    assert set(NOT_BUILT) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(BY_MODEL_TYPE)
    assert set(LOST) <= set(BUILT)


@pytest.mark.parametrize("model_type", BUILT)
def test_full_rank(tmp_path: Path, model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about the sizes
        pair = save(tmp_path, model_type)
    out = adapt_convert.convert(pair.base, pair.ft, rank=1000).save(tmp_path / "out")
    rows = json.loads((out / "conversion.json").read_text())["tensors"]
    assert {key for row in rows.values() for key in row["source_tensors"]} == set(load_file(pair.ft / "model.safetensors"))
    losses = {name: row["reason"] for name, row in rows.items() if row["status"] == "dropped" and row["energy"]}
    assert bool(losses) == (model_type in LOST), losses
    for name, reason in losses.items():
        assert reason.startswith(LOST[model_type]), (name, reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, before = pair.logits(without_losses(pair, rows, tmp_path / "rest")), pair.logits(pair.load(pair.base))
        found = pair.logits(pair.load_peft(out))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (expected - before).abs().max() > 1e-2
    if losses:
        with pytest.raises(AdaptError, match=r"^--strict: [^\n]*would be lost; leave out with --exclude what may be lost$"):
            adapt_convert.convert(pair.base, pair.ft, rank=1000, strict=True)
