"""Model cards: the Python in them makes the fine-tune."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_pair
from families import tiny
from transformers import BertForQuestionAnswering

import adapt_convert
from adapt_convert.formats.card import _auto_class


@torch.no_grad()
@pytest.mark.parametrize("kind", ["a model that answers questions", "a model that listens"])
def test_the_code_in_the_card_loads(kind: str, tmp_path: Path) -> None:
    model_class, config = tiny("whisper") if kind == "a model that listens" else (BertForQuestionAnswering, tiny("bert")[1])
    pair = save_pair(tmp_path, model_class, config)
    out = adapt_convert.convert(pair.base, pair.ft, rank=64).save(tmp_path / "out")
    found, expected = run_card(out)(**pair.inputs), pair.load(pair.ft)(**pair.inputs)
    name = "logits" if "logits" in expected else "start_logits"
    torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=1e-4)


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
