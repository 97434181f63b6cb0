"""The architecture table against the model classes of transformers: every entry is true, and every entry converts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair, save_pair
from families import TINY, tiny
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.architectures import place_of
from adapt_convert.convert.families import BY_MODEL_TYPE
from adapt_convert.convert.family import FUSED


@pytest.fixture(scope="module")
def family_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Pair] = {}

    def make(model_type: str) -> Pair:
        if model_type not in made:
            made[model_type] = save_pair(tmp_path_factory.mktemp(model_type), *tiny(model_type), _what_peft_can_hold)
        return made[model_type]

    return make


# Bare parameters beside modules that are factored.
_UNHELD = (
    "sinks",
    "class_embedding",
    "cls_token",
    "mask_token",
    "lambda_",
    "vision_tower.head",
    "image_newline",
    "embedding_vlm",
    "gate_bias",
    "expert_bias",
    "A_log",
    "mixer.D",
    "dt_bias",
    "mamba.D",
)


def _what_peft_can_hold(model: Any) -> None:
    """Change everything but the parameters that PEFT has no place for (test_experts.py has them reported)."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in _UNHELD):
            parameter += 0.05 * torch.randn_like(parameter)


def test_every_entry_has_a_tiny_model_and_is_documented() -> None:
    assert set(TINY) == set(BY_MODEL_TYPE)
    page = (Path(__file__).parent.parent / "docs" / "sources.md").read_text()
    rows = re.findall(r"^\| [a-z -]+ \| ([a-z][a-z0-9_, -]+) \|$", page.split("| listed |")[1], re.MULTILINE)
    assert sorted(name for row in rows for name in row.split(", ")) == sorted(BY_MODEL_TYPE)


@pytest.mark.parametrize("model_type", TINY)
def test_the_table_names_what_the_model_class_has(model_type: str) -> None:
    model_class, config = tiny(model_type)
    with torch.device("meta"):
        model = model_class(config)
    family = BY_MODEL_TYPE[model_type]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert not family.prefix or hasattr(model, family.prefix)
    if hasattr(model, model.base_model_prefix):  # T5 has its backbone's parts on the model itself
        assert family.prefix == model.base_model_prefix
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
        stacked = [module for name, module in model.named_modules() if name.endswith(f".1.{family.experts.stacked}")]
        names = [name for name, _ in stacked[0].named_parameters(recurse=False)]
        assert names == list(family.experts.parameters or ("gate_up_proj", "down_proj"))
    for name in family.whole:
        assert any(module.endswith(f".{name}") for module, _ in model.named_modules())


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


@pytest.mark.parametrize("model_type", [name for name, family in BY_MODEL_TYPE.items() if family.renames])
def test_names_of_another_release_convert_alike(family_pair: Any, tmp_path: Path, model_type: str) -> None:
    """The fine-tune under its names in memory, the base under those on disk."""
    pair = family_pair(model_type)
    expected = adapt_convert.convert(pair.base, pair.ft, rank=2).save(tmp_path / "expected")
    (tmp_path / "ft").mkdir()
    state = {name: value.detach().clone() for name, value in pair.load(pair.ft).named_parameters()}
    assert set(state) != set(load_file(pair.ft / "model.safetensors"))
    save_file(state, tmp_path / "ft" / "model.safetensors")
    (tmp_path / "ft" / "config.json").write_bytes((pair.ft / "config.json").read_bytes())
    out = adapt_convert.convert(pair.base, tmp_path / "ft", rank=2).save(tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


_QKV = {"qkv", "qkv_groups"} & set(FUSED)
_FUSED = [(name, {}) for name, family in BY_MODEL_TYPE.items() for block in family.blocks if set(block.roles) & _QKV]
_FUSED += [
    ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gpt_bigcode", {"multi_query": False}),
]


def _plant(model: Any) -> None:
    """Add one tensor of rank 2 to q, k, v and o of all layers, each cut from its weight as the model class cuts it."""
    config, d, size = model.config, model.config.hidden_size, 8
    heads = config.num_attention_heads
    fused, output = _attention_of(_layers(model)[0])
    of_keys = (max(fused.weight.shape) // size - heads) // 2  # what is left of the rows is two times the heads of keys
    counts = (heads, of_keys, of_keys, heads)
    A, B = torch.randn(d, 2), torch.randn(size, 2)
    by_head = {count: torch.randn(count, 2) for count in set(counts)}
    by_layer, by_matrix = torch.randn(config.num_hidden_layers, 2), torch.randn(4, 2)
    for layer, block in enumerate(_layers(model)):
        q, k, v, o = (
            0.3 * torch.einsum("dr,jr,hr,r->hjd", A, B, by_head[count], by_layer[layer] * by_matrix[number])
            for number, count in enumerate(counts)
        )
        fused, output = _attention_of(block)
        if type(fused).__name__ == "Conv1D":
            fused.weight += torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)]).T
            output.weight += o.flatten(0, 1)
        elif config.model_type in ("phi3", "mpt", "modernbert"):
            fused.weight += torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])
            output.weight += o.flatten(0, 1).T
        else:  # of every head of keys: the queries that share it, that head, its values
            groups = torch.cat([q.unflatten(0, (of_keys, -1)), k[:, None], v[:, None]], dim=1)
            fused.weight += groups.flatten(0, 2)
            output.weight += o.flatten(0, 1).T


_NAMES = (
    ("attn.c_attn", "attn.c_proj"),
    ("attn.Wqkv", "attn.out_proj"),
    ("attn.Wqkv", "attn.Wo"),
    ("self_attn.qkv_proj", "self_attn.o_proj"),
    ("self_attn.query_key_value", "self_attn.dense"),
    ("attention.query_key_value", "attention.dense"),
    ("self_attention.query_key_value", "self_attention.dense"),
)


def _attention_of(block: Any) -> tuple[Any, Any]:
    """The fused q, k and v, and the output, of one layer."""
    modules = dict(block.named_modules())
    return next((modules[a], modules[b]) for a, b in _NAMES if a in modules and b in modules)


def _layers(model: Any) -> Any:
    backbone = getattr(model, model.base_model_prefix)
    return next(getattr(backbone, name) for name in ("h", "layers", "blocks") if hasattr(backbone, name))


@pytest.mark.parametrize(("model_type", "variant"), _FUSED)
def test_a_lorta_of_fused_matrices(tmp_path: Path, model_type: str, variant: dict[str, Any]) -> None:
    """A tensor of rank 2 over the logical matrices is found whole, so they were cut in the right rows; and it runs as it merges."""
    pair = save_pair(tmp_path, *tiny(model_type, **variant), _plant)
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2).save(tmp_path / "lorta")
    assert json.loads((out / "conversion.json").read_text())["captured_energy_of_all_changes"] > 1 - 1e-6
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    for model in (pair.load(tmp_path / "merged"), adapt_convert.load(pair.load(pair.base), out)):
        torch.testing.assert_close(pair.logits(model), pair.logits(pair.load(pair.ft)), atol=2e-3, rtol=2e-3)
    assert (pair.logits(pair.load(pair.ft)) - pair.logits(pair.load(pair.base))).abs().max() > 0.05


@pytest.mark.parametrize("model_type", [name for name, family in BY_MODEL_TYPE.items() if not family.blocks])
def test_what_no_lorta_holds_is_refused_with_the_reason(family_pair: Any, model_type: str) -> None:
    pair, reason = family_pair(model_type), BY_MODEL_TYPE[model_type].why_no_lorta
    with pytest.raises(AdaptError, match=f"^--to lorta .*{model_type} has none that it could hold: {reason}; use --to lora$"):
        adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=1)
    with pytest.raises(AdaptError, match=f"LatTE does not support {model_type}; .*use --to lora$"):
        adapt_convert.convert(pair.base, pair.ft, to="latte", rank=1)


def test_a_lorta_of_gate_and_up_in_one_weight(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        A, B, by_layer = torch.randn(32, 1), torch.randn(48, 1), (1.0, -0.5)
        for scale, layer in zip(by_layer, model.model.layers, strict=True):
            layer.mlp.gate_up_proj.weight += scale * torch.cat([B @ A.T, 2 * B @ A.T])
            layer.mlp.down_proj.weight += scale * 3 * A @ B.T

    pair = save_pair(tmp_path, *tiny("phi3"), plant)
    with pytest.raises(AdaptError, match="none of the targeted matrices changed"):
        adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=1)
    out = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=1, target_modules=("mlp",)).save(tmp_path / "lorta")
    live = adapt_convert.load(pair.load(pair.base), out)
    torch.testing.assert_close(pair.logits(live), pair.logits(pair.load(pair.ft)), atol=2e-3, rtol=2e-3)
