"""Model cards: the Python in them makes the fine-tune."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from transformers import BertForQuestionAnswering

import adapt_convert
from adapt_convert.formats.card import _auto_class


def random_pair(model: Any, directory: Path) -> Any:
    """Save a model and a fine-tune of all its weights; returns the latter."""
    model.eval().save_pretrained(directory / "base")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory / "ft")
    return model


@torch.no_grad()
def test_the_code_in_the_card_loads_a_model_that_answers_questions(pairs, tmp_path: Path) -> None:
    pair = pairs("bert")
    ft = random_pair(BertForQuestionAnswering(pair.load(pair.base).config), tmp_path)
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=64).save(tmp_path / "out")
    torch.testing.assert_close(run_card(out)(**pair.inputs).start_logits, ft(**pair.inputs).start_logits, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_code_in_the_card_loads_a_model_that_listens(tmp_path: Path) -> None:
    model_class, config = tiny("whisper")
    ft = random_pair(model_class(config), tmp_path)
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=64).save(tmp_path / "out")
    sound = {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.tensor([[2, 5, 7]])}
    torch.testing.assert_close(run_card(out)(**sound).logits, ft(**sound).logits, atol=2e-4, rtol=1e-4)


def run_card(directory: Path) -> Any:
    """The model that the Python in a model card makes."""
    code = (directory / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code.replace('"path/of/this/directory"', repr(str(directory))), names)
    return names["model"].eval()


@pytest.mark.parametrize(("more", "name"), [({}, "ThingForAnswers"), ({"auto_map": {"AutoModel": "thing.ThingForAnswers"}}, "AutoModel")])
def test_a_class_of_custom_code_is_not_one_of_transformers(more: dict[str, Any], name: str) -> None:
    assert _auto_class("ThingForAnswers", more) == name
