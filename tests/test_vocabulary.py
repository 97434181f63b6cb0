"""Fine-tunes whose tables and heads have other rows than the base's: added tokens and classes load as the model card says."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, Pair, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import adapt_convert
from adapt_convert import AdaptError

ADDED = 104


def with_tokens(directory: Path, name: str, change: bool = True) -> Pair:
    """A pair whose fine-tune `transformers` has resized by 8 tokens; all of it has changed, or nothing but the new rows."""
    model_class, config = MODELS[name]
    pair = save_pair(directory, model_class, config)
    model = pair.load(pair.ft if change else pair.base)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(ADDED)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[96:] = torch.randn(8, table.weight.shape[1])
    model.save_pretrained(pair.ft)
    return Pair(pair.base, pair.ft, model_class, {"input_ids": torch.tensor([[5, 99, 7, 103, 96]])})


def load_as_the_card_says(out: Path, **names: Any) -> Any:
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1].replace("path/of/this/directory", str(out))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("to", ["lora", "lorta", "latte"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_added_tokens_load_as_the_card_says(tmp_path: Path, name: str, to: str) -> None:
    pair = with_tokens(tmp_path, name)
    rank = {"lora": 64, "lorta": 4, "latte": 32}[to]
    extra = {"target_modules": ("all-linear",)} if to == "lorta" else {}
    out = adapt_convert.convert(pair.base, pair.ft, to=to, rank=rank, strict=to == "lora", **extra).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    assert report["vocabulary"] == ADDED
    model = load_as_the_card_says(out)
    assert pair.logits(model).shape[-1] == ADDED
    expected = load_file(pair.ft / "model.safetensors")
    key = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table, expected[key], atol=0, rtol=0)
    if to != "lorta":
        torch.testing.assert_close(pair.logits(model), pair.logits(pair.load(pair.ft)), atol=1e-3, rtol=1e-3)


def test_the_unresized_base_is_told_what_to_do(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2).save(tmp_path / "out")
    with pytest.raises(AdaptError, match=r"added tokens, model\.resize_token_embeddings\(104\) first"):
        adapt_convert.load(pair.load(pair.base), out)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_merging_enlarges_the_base(tmp_path: Path, name: str) -> None:
    pair = with_tokens(tmp_path, name)
    out = adapt_convert.convert(pair.base, pair.ft, rank=64).save(tmp_path / "out")
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == ADDED
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(pair.load(pair.ft)), atol=1e-3, rtol=1e-3)


def test_tokens_alone_are_nothing_to_factor(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama", change=False)
    with pytest.raises(AdaptError, match="none of the targeted matrices changed"):
        adapt_convert.convert(pair.base, pair.ft, rank=4)


def test_what_is_excluded_needs_no_resizing(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=4, exclude=("embed_tokens", "lm_head"), strict=True).save(tmp_path / "out")
    assert "vocabulary" not in json.loads((out / "conversion.json").read_text())
    pair.load_peft(out)
    assert "resize_token_embeddings" not in (out / "README.md").read_text()


def test_added_classes_load_as_the_card_says(tmp_path: Path) -> None:
    model_class, config = MODELS["roberta"]
    pair = save_pair(tmp_path, model_class, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = AutoModelForSequenceClassification.from_pretrained(pair.ft, num_labels=5, ignore_mismatched_sizes=True)
    tuned.save_pretrained(pair.ft)
    out = adapt_convert.convert(pair.base, pair.ft, rank=64, strict=True).save(tmp_path / "out")
    assert json.loads((out / "conversion.json").read_text())["classes"] == 5
    torch.testing.assert_close(pair.logits(load_as_the_card_says(out)), pair.logits(pair.load(pair.ft)), atol=1e-3, rtol=1e-3)
