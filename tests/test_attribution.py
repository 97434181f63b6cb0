"""The KL by matrix against KLs measured with plain `transformers`, and LatTE's energies against dense algebra."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_convert
from adapt_convert.convert.validation import validate

IDS = [[(7 * i + 3 * j) % 90 + 3 for i in range(20)] for j in range(4)]
NAMES = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit", "t5"]


def run(pair: Any, *candidates: Path, **options: Any) -> Any:
    ids = {} if "vit" in type(pair.load(pair.base)).__name__.lower() else {"token_ids": IDS}
    return validate(pair.base, pair.ft, *candidates, **(ids | {"speed": False} | options))


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_every_kind_sum_to_the_measured_kl(pairs: Any, tmp_path: Path, name: str) -> None:
    pair = pairs(name)
    lora = adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path / "lora")
    lorta = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=4).save(tmp_path / "lorta")
    adapt_convert.merge(pair.base, lora, tmp_path / "merged")
    candidates = [lora, lorta, tmp_path / "merged", pair.ft]
    if name not in ("bert", "roberta", "vit", "t5"):
        candidates.append(adapt_convert.convert(pair.base, pair.ft, to="latte", rank=8).save(tmp_path / "latte"))
    if name in ("gpt2", "bert", "roberta", "vit"):
        options = {"to": "latte", "rank": 4, "construction": "score"}
        candidates.append(adapt_convert.convert(pair.base, pair.ft, **options).save(tmp_path / "score"))
    for row in run(pair, *candidates).candidates:
        found = row.attribution
        print(name, row.contender.path[-8:], found.measured, found.total, len(found.removed))
        assert found.total == pytest.approx(found.measured, rel=2e-3, abs=1e-4), row.contender.kind
