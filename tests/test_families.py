"""The architecture table against the model classes of transformers: every entry is true, and every entry converts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair, save_pair
from families import TINY, tiny

import adapt_convert
from adapt_convert.convert.architectures import place_of
from adapt_convert.convert.families import BY_MODEL_TYPE, FUSED


@pytest.fixture(scope="module")
def family_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Pair] = {}

    def make(model_type: str) -> Pair:
        if model_type not in made:
            made[model_type] = save_pair(tmp_path_factory.mktemp(model_type), *tiny(model_type), _without_sinks)
        return made[model_type]

    return make


def _without_sinks(model: Any) -> None:
    """Change everything but the attention sinks of gpt-oss, which PEFT has no place for (test_experts.py has them reported)."""
    for name, parameter in model.named_parameters():
        if not name.endswith("sinks"):
            parameter += 0.05 * torch.randn_like(parameter)


def test_every_entry_has_a_tiny_model() -> None:
    assert set(TINY) == set(BY_MODEL_TYPE)


@pytest.mark.parametrize("model_type", TINY)
def test_the_table_names_what_the_model_class_has(model_type: str) -> None:
    model_class, config = tiny(model_type)
    with torch.device("meta"):
        model = model_class(config)
    family = BY_MODEL_TYPE[model_type]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert not family.prefix or hasattr(model, family.prefix)
    assert model.base_model_prefix in (family.prefix, "transformer")  # T5 has its backbone's parts on the model itself
    found = {(place.block, place.role) for name in parameters if (place := place_of(name.removesuffix(".weight"), family))}
    assert found == {
        (number, role)
        for number, block in enumerate(family.blocks)
        for role, module in block.roles.items()
        if any(f"{block.path.format(0)}.{name}.weight" in parameters for name in module.split("|")) or role not in _OPTIONAL
    }
    for alias, owner in family.tied.items():
        assert alias in parameters, alias
        assert owner in parameters, owner
    if family.stream:
        block = model.get_submodule(family.blocks[0].path.format(1))
        for norm in (*family.stream.norms, *family.stream.post_norms):
            block.get_submodule(norm)
        model.get_submodule(family.stream.final)
    if family.experts:
        stacked = model.get_submodule(f"{family.blocks[0].path.format(1)}.{family.experts.stacked}")
        names = [name for name, _ in stacked.named_parameters(recurse=False)]
        assert names == list(family.experts.parameters or ("gate_up_proj", "down_proj"))


_OPTIONAL = ("gate",)  # T5 has it in its gated variants alone


@pytest.mark.parametrize("model_type", TINY)
def test_full_rank_is_the_fine_tune(family_pair: Any, tmp_path: Path, model_type: str) -> None:
    pair = family_pair(model_type)
    out = adapt_convert.convert(pair.base, pair.ft, rank=64).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    assert {row["status"] for row in report["tensors"].values()} <= {"factored", "exact", "unchanged"}
    logits, base = pair.logits(pair.load_peft(out)), pair.logits(pair.load(pair.base))
    torch.testing.assert_close(logits, pair.logits(pair.load(pair.ft)), atol=5e-4, rtol=5e-4)
    assert (logits - base).abs().max() > 1e-2


_FUSED = [name for name, family in BY_MODEL_TYPE.items() for block in family.blocks if set(block.roles) & set(FUSED)]


@pytest.mark.parametrize("model_type", _FUSED)
def test_a_lorta_of_fused_matrices_runs_as_it_merges(family_pair: Any, tmp_path: Path, model_type: str) -> None:
    """A rank that holds everything: the logical matrices were cut out of their fused weights, and put back, in the right rows."""
    pair = family_pair(model_type)
    options = {"target_modules": ("all-linear",), "exclude": ("embed_tokens", "lm_head"), "rank": 24}
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", **options).save(tmp_path / "lorta")
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    merged = pair.logits(pair.load(tmp_path / "merged"))
    live = adapt_convert.load(pair.load(pair.base), out)
    torch.testing.assert_close(pair.logits(live), merged, atol=1e-4, rtol=1e-4)
    assert (merged - pair.logits(pair.load(pair.base))).abs().max() > 1e-3
