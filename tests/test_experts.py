"""Mixtures of experts: every layout on disk converts, what is written runs in PEFT, and what PEFT trained is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair, save_pair
from families import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.families import BY_MODEL_TYPE

MIXTURES = [name for name, family in BY_MODEL_TYPE.items() if family.experts]


def experts_of(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if ".experts." in name}


def change_experts(model: Any, rank: int = 2) -> None:
    """A change of low rank in every expert of the last layer, of one number in every bias, and of none elsewhere."""
    for name, value in experts_of(model).items():
        if ".1." in name and value.ndim == 3:
            value += 0.3 * torch.randn(*value.shape[:2], rank) @ torch.randn(value.shape[0], rank, value.shape[2])
        elif ".1." in name:
            value[1] += 0.5


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            made[name] = save_pair(tmp_path_factory.mktemp(name), *tiny(name), change_experts)
        return made[name]

    return make


def same_logits(pair: Pair, model: Any, other: Any, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(pair.logits(model), pair.logits(other), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_solved_alone(mixture: Any, tmp_path: Path, name: str) -> None:
    """At the rank of every expert's own change nothing is left; a stack taken for one matrix would need the sum of the ranks."""
    pair = mixture(name)
    out = adapt_convert.convert(pair.base, pair.ft, rank=2, strict=True).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    factored = {row: figures for row, figures in report["tensors"].items() if figures["status"] == "factored"}
    parameters = BY_MODEL_TYPE[name].experts.parameters
    assert len(factored) == (8 + sum(name.endswith("_bias") for name in parameters) if parameters else 12)  # four experts of one layer
    assert report["captured_energy_of_all_changes"] > 1 - 1e-9
    stored = load_file(pair.ft / "model.safetensors")
    assert {key for figures in report["tensors"].values() for key in figures["source_tensors"]} == set(stored)
    same_logits(pair, pair.load_peft(out), pair.load(pair.ft))
    assert (pair.logits(pair.load(pair.ft)) - pair.logits(pair.load(pair.base))).abs().max() > 1e-2
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in stored.items()}
    for key, value in stored.items():
        torch.testing.assert_close(merged[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_ranks_of_each_expert_differ(tmp_path: Path, name: str) -> None:
    """PEFT holds one rank for all experts: smaller ones are padded, and what it runs is what the report speaks of."""
    pair = save_pair(tmp_path, *tiny(name), lambda model: [p.add_(0.05 * torch.randn_like(p)) for p in experts_of(model).values()])
    out = adapt_convert.convert(pair.base, pair.ft, energy=0.7).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    rows = [row for row in report["tensors"].values() if row["status"] == "factored"]
    assert len({row["rank"] for row in rows}) > 1
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    same_logits(pair, pair.load_peft(out), pair.load(tmp_path / "merged"))


@pytest.mark.parametrize("name", [name for name in MIXTURES if BY_MODEL_TYPE[name].experts.modules])
def test_stacks_as_memory_has_them_convert_like_experts_one_by_one(mixture: Any, tmp_path: Path, name: str) -> None:
    pair = mixture(name)
    expected = adapt_convert.convert(pair.base, pair.ft, rank=2).save(tmp_path / "expected")
    (tmp_path / "ft").mkdir()
    model = pair.load(pair.ft)
    names = {id(value): key for key, value in model.named_parameters()}
    save_file({names[id(p)]: p.detach().contiguous() for p in model.parameters()}, tmp_path / "ft" / "model.safetensors")
    (tmp_path / "ft" / "config.json").write_bytes((pair.ft / "config.json").read_bytes())
    out = adapt_convert.convert(pair.base, tmp_path / "ft", rank=2).save(tmp_path / "out")
    assert (out / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", MIXTURES)
def test_what_peft_trained_on_stacks_is_read(mixture: Any, tmp_path: Path, name: str) -> None:
    """The stacks' own form in PEFT: merged here it gives PEFT's own merged model, and converted anew it runs as before."""
    pair = mixture(name)
    stacked = BY_MODEL_TYPE[name].experts.parameters or ("gate_up_proj", "down_proj")
    parameters = [f"mlp.experts.{parameter}" for parameter in stacked]
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(pair.load(pair.base), config)
        tuned.save_pretrained(tmp_path / "lora")
    adapt_convert.merge(pair.base, tmp_path / "lora", tmp_path / "merged")
    same_logits(pair, pair.load(tmp_path / "merged"), tuned.merge_and_unload())
    out = adapt_convert.convert(pair.base, tmp_path / "lora", rank=3).save(tmp_path / "out")
    same_logits(pair, pair.load_peft(out), pair.load(tmp_path / "merged"))


def test_what_peft_has_no_place_for_is_named(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        change_experts(model)
        model.model.layers[0].self_attn.sinks += 1.0

    pair = save_pair(tmp_path, *tiny("gpt_oss"), change)
    row = adapt_convert.convert(pair.base, pair.ft, rank=2).report["tensors"]["model.layers.0.self_attn.sinks"]
    assert row["status"] == "dropped"
    assert "holds what is factored or left out" in row["reason"]
    with pytest.raises(AdaptError, match=r"--strict: .*sinks"):
        adapt_convert.convert(pair.base, pair.ft, rank=2, strict=True)


def test_an_unlisted_mixture_has_its_experts_named(mixture: Any, tmp_path: Path) -> None:
    pair = mixture("mixtral")
    for side in ("base", "ft"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "model.safetensors").write_bytes((getattr(pair, side) / "model.safetensors").read_bytes())
        config = json.loads((pair.base / "config.json").read_text()) | {"model_type": "newest_moe"}
        (tmp_path / side / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdaptError, match="none of the targeted matrices changed"):
        adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=2)
    losses = adapt_convert.inspect(tmp_path / "base", tmp_path / "ft")["losses"]
    assert losses["model.layers.1.block_sparse_moe.experts.3.w2.weight"].startswith("part of a mixture of experts")


def test_a_stack_beside_its_own_experts_is_refused(mixture: Any, tmp_path: Path) -> None:
    pair = mixture("mixtral")
    state = load_file(pair.ft / "model.safetensors")
    state["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 48)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pair.ft / "config.json").read_bytes())
    with pytest.raises(AdaptError, match="once more on its own"):
        adapt_convert.convert(pair.base, tmp_path, rank=2)
    for shape in ((4, 32), (0, 96, 32), (4, 95, 32)):
        save_file({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(shape)}, tmp_path / "model.safetensors")
        with pytest.raises(AdaptError, match="expected a stack of matrices"):
            adapt_convert.convert(pair.base, tmp_path, rank=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": []}, None),
        ({"rank_pattern": {"experts": "x"}}, "rank_pattern = .*expected regular expressions and numbers"),
        ({"r": 5}, "no multiple of the rank 5"),
        ({"r": 2.5}, "no multiple of the rank 2.5"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "which .* does not have"),
    ],
)
def test_a_damaged_config_of_stacks(mixture: Any, tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    pair = mixture("mixtral")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
        get_peft_model(pair.load(pair.base), config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | change))
    if message is None:
        adapt_convert.convert(pair.base, tmp_path, rank=2)
        return
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(pair.base, tmp_path, rank=2)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_validator_runs_them(mixture: Any, tmp_path: Path, name: str) -> None:
    """What PEFT has stacked counts as loaded; what it has not, does not."""
    pair = mixture(name)
    out = adapt_convert.convert(pair.base, pair.ft, rank=2).save(tmp_path / "out")
    if name == "mixtral":
        state = load_file(out / "adapter_model.safetensors")
        save_file(state | {"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, out / "adapter_model.safetensors")
    result = adapt_convert.validate(pair.base, pair.ft, out, token_ids=[list(range(5, 25))], attribution=False, speed=False)
    ignored = [f"{out}: peft ignores tensors of the adapter: base_model.model.x.lora_A.weight"]
    assert list(result.failures) == (ignored if name == "mixtral" else [])
