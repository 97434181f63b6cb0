"""Tiny real models, built by transformers from their configs: a base and a fine-tune in which every parameter has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        RobertaConfig,
        RobertaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_TEXT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = _TEXT | _WIDE | {"num_key_value_heads": 2}

MODELS: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_GQA, tie_word_embeddings=False)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**_GQA, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**_GQA)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_GQA)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "bert": (BertForMaskedLM, BertConfig(**_TEXT, **_WIDE, max_position_embeddings=64)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**_TEXT, **_WIDE, max_position_embeddings=64)),
    "vit": (ViTForImageClassification, ViTConfig(**_WIDE, image_size=16, patch_size=8, num_labels=3)),
    "t5": (T5ForConditionalGeneration, T5Config(**_TEXT, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)),
}


@dataclass(frozen=True)
class Pair:
    """A base and its fine-tune on disk, and the means to load and run either."""

    base: Path
    ft: Path
    model_class: Any
    inputs: dict[str, torch.Tensor]

    def load(self, path: Path) -> Any:
        return self.model_class.from_pretrained(path).eval()

    def load_peft(self, adapter: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self.load(self.base), adapter).eval()

    def save_adapter(self, config: Any, directory: Path, seed: int = 0, base: Any = None) -> Any:
        """An adapter of the base (or of another live model) that looks trained, saved by `peft`: whatever it trains is random.

        Returns the live model.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)  # peft draws the first factors itself
            model = peft.get_peft_model(base or self.load(self.base), config).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(directory)
        return model

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(**self.inputs).logits


def save_pair(directory: Path, model_class: Any, config: Any, change: Callable[[Any], None] | None = None) -> Pair:
    """Save a random base and a fine-tune whose every parameter differs, or is changed by `change`."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():  # biases and norm gains start as zeros and ones: make them count
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory / "base")
    if change is None:
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    else:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory / "ft")
    return Pair(directory / "base", directory / "ft", model_class, _inputs(config))


def _inputs(config: Any) -> dict[str, torch.Tensor]:
    if config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, config.image_size, config.image_size)}
    ids = torch.randint(3, config.get_text_config().vocab_size, (2, 9))
    if config.model_type == "whisper":
        return {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions), "decoder_input_ids": ids}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if config.is_encoder_decoder and config.model_type != "bart" else {})


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            model_class, config = MODELS[name]
            made[name] = save_pair(tmp_path_factory.mktemp(name), model_class, config)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """`make_pair(directory, name, change)`: a pair of a listed model whose fine-tune is what `change(model)` makes of it."""

    def make(directory: Path, name: str, change: Callable[[Any], None] | None = None, **overrides: Any) -> Pair:
        model_class, config = MODELS[name]
        return save_pair(directory, model_class, type(config)(**{**config.to_diff_dict(), **overrides}), change)

    return make


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test alone keeps moments and refinements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapt-convert"


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)
