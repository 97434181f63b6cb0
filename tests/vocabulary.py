"""Pairs whose fine-tune has more tokens than its base, and loading what is made of them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from conftest import MODELS, Pair, save_pair

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
