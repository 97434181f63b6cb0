"""Fine-tunes whose tables and heads have other rows than the base's: added tokens and classes load as the model card says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import MODELS, Pair, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from vocabulary import ADDED, load_as_the_card_says, with_tokens

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.cli import main


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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, {"rank": 4}) for name in ("llama", "llama-tied", "gpt2")),
        *(("llama", size) for size in ({"energy": 0.9}, {"budget": 2000}, {"profile": "peft"})),
    ],
    ids=str,
)
def test_tokens_alone_are_stored(tmp_path: Path, name: str, size: dict[str, Any]) -> None:
    """Nothing but the rows is new: PEFT loads an adapter without factors, and merging it enlarges the base."""
    pair = with_tokens(tmp_path, name, change=False)
    out = adapt_convert.convert(pair.base, pair.ft, strict=True, **size).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    assert {row["status"] for row in report["tensors"].values()} == {"exact", "unchanged"}
    assert report["captured_energy"] is None
    assert not any("lora_" in key for key in load_file(out / "adapter_model.safetensors"))
    expected = pair.logits(pair.load(pair.ft))
    torch.testing.assert_close(pair.logits(load_as_the_card_says(out)), expected, atol=1e-6, rtol=1e-6)
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), expected, atol=1e-6, rtol=1e-6)


def test_a_new_head_alone_is_stored(tmp_path: Path) -> None:
    model_class, config = MODELS["roberta"]
    pair = save_pair(tmp_path, model_class, config)
    pair.load(pair.ft).roberta.save_pretrained(tmp_path / "backbone")
    out = adapt_convert.convert(tmp_path / "backbone", pair.ft, rank=4, strict=True).save(tmp_path / "out")
    headless = Pair(tmp_path / "backbone", pair.ft, model_class, pair.inputs)
    torch.testing.assert_close(pair.logits(headless.load_peft(out)), pair.logits(pair.load(pair.ft)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("to", "said"), [("lorta", "--to lora stores what"), ("latte", "there is nothing to factor")])
def test_tokens_alone_make_a_lora_only(tmp_path: Path, to: str, said: str) -> None:
    pair = with_tokens(tmp_path, "llama", change=False)
    with pytest.raises(AdaptError, match=f"none of the targeted matrices changed; {said}"):
        adapt_convert.convert(pair.base, pair.ft, to=to, rank=4)


def test_tokens_alone_through_the_command_line(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama", change=False)
    done = CliRunner().invoke(main, ["delta", str(pair.base), str(pair.ft), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "nothing to factor had changed" in done.output
    assert "resize_token_embeddings(104)" in done.output


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
