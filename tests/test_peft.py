"""Adapters that `peft` itself made, read as factored deltas: converted, merged, and refused where they are no plain LoRA."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.opening import open_pair
from adapt_convert.formats.errors import AdaptError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options)


# name -> (model, the adapter's config, the largest rank in it)
ADAPTERS: dict[str, tuple[str, LoraConfig, int]] = {
    "plain": ("llama", lora(), 4),
    "alpha is not r": ("llama", lora(lora_alpha=13), 4),
    "rsLoRA": ("llama", lora(lora_alpha=7, use_rslora=True), 4),
    "rank_pattern": ("llama", lora(rank_pattern={"v_proj": 2}, lora_alpha=6), 4),
    "patterns as regular expressions": (
        "llama",
        lora(
            target_modules=ATTENTION,
            rank_pattern={r"layers\.1\..*\.q_proj": 7, "^model.layers.0.self_attn.k_proj": 2, r"[vo]_proj": 3},
            alpha_pattern={r"layers\.\d+\.self_attn\.(k|q)_proj": 5, "proj": 99, "q_proj": 77},
            lora_alpha=11,
        ),
        7,
    ),
    "patterns with rsLoRA": ("llama", lora(rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3}, use_rslora=True), 6),
    "pattern of a name's end is no match": ("llama", lora(alpha_pattern={"_proj": 50, "proj": 60, "0.self_attn.q_proj": 5}), 4),
    "all-linear": ("llama", lora(target_modules="all-linear", lora_alpha=3), 4),
    "target_modules as a regular expression": ("llama", lora(target_modules=r".*layers\.1\..*(up|q)_proj"), 4),
    "some layers": ("llama", lora(layers_to_transform=[1], layers_pattern="layers"), 4),
    "GPT-2, fan_in_fan_out": ("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_alpha=9), 4),
    "embedding": ("llama", lora(target_modules=["q_proj", "embed_tokens"], lora_alpha=6), 4),
    "embedding with rsLoRA": ("llama", lora(target_modules=["embed_tokens", "q_proj"], lora_alpha=6, use_rslora=True), 4),
    "head": ("llama", lora(target_modules=["q_proj", "lm_head"]), 4),
    "modules_to_save": ("llama", lora(modules_to_save=["lm_head", "norm"]), 4),
    "modules_to_save, embedding": ("llama", lora(modules_to_save=["embed_tokens", "input_layernorm"]), 4),
    "a classifier's head": ("roberta", lora(target_modules=["query", "value"], modules_to_save=["classifier"], lora_alpha=6), 4),
    "bias all": ("qwen2", lora(bias="all", lora_alpha=6), 4),
    "bias lora_only": ("qwen2", lora(bias="lora_only", target_modules=[*ATTENTION, "down_proj"]), 4),
    "bias all, GPT-2": ("gpt2", lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True), 4),
    "lora_bias": ("qwen2", lora(target_modules=["q_proj", "k_proj"], lora_bias=True, lora_alpha=10), 4),
    "lora_bias with rsLoRA": ("qwen2", lora(target_modules=["q_proj"], lora_bias=True, use_rslora=True), 4),
    "T5": ("t5", lora(target_modules=["q", "v", "wo"], lora_alpha=6), 4),
    "ViT": ("vit", lora(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]), 4),
}


@pytest.fixture(scope="module")
def adapters(pairs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, torch.Tensor, int]]:
    """By name: the pair, the adapter's directory, the logits of the live model, and the largest rank."""
    made: dict[str, Any] = {}

    def make(name: str) -> tuple[Any, Path, torch.Tensor, int]:
        if name not in made:
            model, config, rank = ADAPTERS[name]
            directory = tmp_path_factory.mktemp("adapter")
            made[name] = pairs(model), directory, pairs(model).logits(pairs(model).save_adapter(config, directory)), rank
        return made[name]

    return make


def product_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LowRankDelta) -> torch.Tensor:
        raise AssertionError("the product of the factors was formed")

    monkeypatch.setattr(LowRankDelta, "dense", refuse)


def live_logits(pair, adapter: Path) -> torch.Tensor:
    return pair.logits(pair.load_peft(adapter))


@pytest.mark.parametrize("name", ADAPTERS)
def test_lora_to_lora_keeps_the_model(adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pair, adapter, expected, rank = adapters(name)
    assert (expected - pair.logits(pair.load(pair.base))).abs().max() > 1e-2
    product_is_forbidden(monkeypatch)
    conversion = adapt_convert.convert(pair.base, adapter, to="lora", rank=rank)
    out = conversion.save(tmp_path / "out")
    torch.testing.assert_close(live_logits(pair, out), expected, atol=1e-4, rtol=1e-4)
    assert conversion.report["captured_energy_of_all_changes"] > 1 - 1e-6
    assert conversion.report["inputs"]["source"]["kind"] == "lora"


@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_equals_merge_and_unload(adapters, tmp_path: Path, name: str) -> None:
    pair, adapter, expected, _ = adapters(name)
    adapt_convert.merge(pair.base, adapter, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pair.load_peft(adapter).merge_and_unload().state_dict()
    ours = pair.load(tmp_path / "merged")
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(pair.logits(ours), expected, atol=1e-4, rtol=1e-4)


def test_a_rank_beyond_the_matrix_is_kept_as_its_full_rank(pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    expected = pair.logits(pair.save_adapter(lora(r=40), tmp_path / "adapter"))
    out = adapt_convert.convert(pair.base, tmp_path / "adapter").save(tmp_path / "out")
    torch.testing.assert_close(live_logits(pair, out), expected, atol=1e-4, rtol=1e-4)
    assert any("ranks 16 to 32," in note for note in adapt_convert.inspect(pair.base, tmp_path / "adapter")["notes"])
    assert {t.shape[0] for name, t in load_file(out / "adapter_model.safetensors").items() if "q_proj.lora_A" in name} == {32}


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saves_of_an_enlarged_table_beside_its_value_is_no_change(pairs, tmp_path: Path, dora: bool) -> None:
    pair = pairs("llama")
    base = pair.load(pair.base)
    base.resize_token_embeddings(100, mean_resizing=False)
    model = pair.save_adapter(lora(modules_to_save=["embed_tokens", "lm_head"], use_dora=dora), tmp_path / "adapter", base=base)
    left = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if ".original_module." in name]
    assert left  # peft 0.21 does so
    conversion = adapt_convert.convert(pair.base, tmp_path / "adapter")
    assert sorted(conversion.report["ignored_source_tensors"]) == sorted(left)
    out = conversion.save(tmp_path / "out")
    assert not any(".original_module." in name for name in load_file(out / "adapter_model.safetensors"))
    adapt_convert.merge(pair.base, tmp_path / "adapter", tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(load_file(pair.base / "model.safetensors"))
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "patterns as regular expressions", "GPT-2, fan_in_fan_out", "bias all", "modules_to_save"])
def test_a_smaller_rank_is_the_truncated_svd(adapters, tmp_path: Path, name: str) -> None:
    pair, adapter, _, _ = adapters(name)
    report = adapt_convert.convert(pair.base, adapter, to="lora", rank=1).report
    base, theirs = load_file(pair.base / "model.safetensors"), pair.load_peft(adapter).merge_and_unload().state_dict()
    checked = 0
    for parameter, row in report["tensors"].items():
        if row["status"] == "factored" and parameter in base:
            values = torch.linalg.svdvals((theirs[parameter] - base[parameter]).double())
            assert row["captured_energy"] == pytest.approx(float(values[0] ** 2 / values.square().sum()), rel=1e-4)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", ["plain", "rsLoRA", "all-linear", "GPT-2, fan_in_fan_out", "bias all", "a classifier's head"])
def test_lora_to_lorta(adapters, tmp_path: Path, name: str) -> None:
    pair, adapter, _, _ = adapters(name)
    before = pair.logits(pair.load(pair.base))
    captured = []
    for rank in (1, 6):
        conversion = adapt_convert.convert(pair.base, adapter, to="lorta", rank=rank)
        captured.append(conversion.report["captured_energy"])
        out = conversion.save(tmp_path / f"r{rank}")
    assert 0.02 < captured[0] < captured[1] <= 1
    loaded = pair.logits(adapt_convert.load(pair.load(pair.base), out))
    assert (loaded - before).abs().max() > 1e-2
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    torch.testing.assert_close(loaded, pair.logits(pair.load(tmp_path / "merged")), atol=1e-4, rtol=1e-4)


def test_what_peft_wrote_as_bin(adapters, tmp_path: Path) -> None:
    pair, adapter, expected, _ = adapters("plain")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin")
    out = adapt_convert.convert(pair.base, tmp_path / "adapter", rank=4).save(tmp_path / "out")
    torch.testing.assert_close(live_logits(pair, out), expected, atol=1e-4, rtol=1e-4)
    by_file = adapt_convert.convert(pair.base, tmp_path / "adapter" / "adapter_model.bin", rank=4).save(tmp_path / "out2")
    assert (out / "adapter_model.safetensors").read_bytes() == (by_file / "adapter_model.safetensors").read_bytes()


def test_a_half_precision_adapter_is_scaled_in_float32(adapters, tmp_path: Path) -> None:
    pair, adapter, _, _ = adapters("alpha is not r")
    state = {name: value.bfloat16() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    _, source = open_pair(pair.base, tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (state[f"{key}.lora_{half}.weight"].float() for half in "AB")
    loaded = source.parts["model.layers.0.self_attn.q_proj.weight"].load()
    assert isinstance(loaded, LowRankDelta)
    torch.testing.assert_close(loaded.B @ loaded.A, b @ a * 13 / 4, atol=1e-6, rtol=1e-6)


# What is no plain LoRA, or a broken one: a change of the config and of the tensors, and what the one line has to say.

L0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(key)


def with_tensor(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({key: torch.ones(shape, dtype=dtype)})


BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "no peft_type": ({"peft_type": None}, dict, "peft_type = None"),
    "another peft_type": ({"peft_type": "VERA"}, dict, "says that it is a VERA adapter, and holds no tensor of one"),
    "peft_type a list": ({"peft_type": ["LORA"]}, dict, "which the installed peft does not know"),
    "DoRA without magnitudes": ({"use_dora": True}, dict, "the adapter lacks its lora_magnitude_vector"),
    "DoRA magnitude": ({}, with_tensor(f"{L0}.lora_magnitude_vector", 32), "DoRA magnitude"),
    "DoRA magnitude, newer name": ({}, with_tensor(f"{L0}.lora_magnitude_vector.weight", 32), "DoRA magnitude"),
    "replicated layers": ({"layer_replication": [[0, 2], [0, 2]]}, dict, "replicates layers"),
    "bare parameters": ({"target_parameters": "mlp.experts"}, dict, "target_parameters = 'mlp.experts', expected a list of names"),
    "only A": ({}, without(f"{L0}.lora_B.weight"), "only one half of its factor pair; lora_B.weight is missing"),
    "only B": ({}, without(f"{L0}.lora_A.weight"), "only one half of its factor pair; lora_A.weight is missing"),
    "ranks differ": ({}, with_tensor(f"{L0}.lora_A.weight", 3, 32), "do not multiply"),
    "rank 0": ({}, lambda s: s.update({f"{L0}.lora_A.weight": torch.ones(0, 32), f"{L0}.lora_B.weight": torch.ones(32, 0)}), "multiply"),
    "four dimensions": ({}, with_tensor(f"{L0}.lora_A.weight", 4, 32, 1, 1), "neither matrices nor those of a convolution"),
    "one dimension": ({}, with_tensor(f"{L0}.lora_B.weight", 32), "neither matrices nor those of a convolution"),
    "integers": ({}, with_tensor(f"{L0}.lora_A.weight", 4, 32, dtype=torch.int8), "lora_A.weight is stored as I8"),
    "other width": ({}, with_tensor(f"{L0}.lora_A.weight", 4, 31), r"\[32, 31\] .* but \[32, 32\]"),
    "bias of another width": ({}, with_tensor(f"{L0}.lora_B.bias", 7), "which .* does not have"),
    "bias alone": ({}, lambda s: (s.clear(), s.update({f"{L0}.lora_B.bias": torch.ones(32)})), "only one half|which .* does not have"),
    "module of another base": ({}, with_tensor("base_model.model.model.layers.9.mlp.x.lora_A.weight", 4, 32), "only one half"),
    "unknown slot": ({}, with_tensor(f"{L0}.lora_C.weight", 4, 32), "lora_C"),
    "new tokens": ({}, with_tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32), "token"),
    "alpha text": ({"lora_alpha": "13"}, dict, "lora_alpha = '13', expected a positive number"),
    "alpha true": ({"lora_alpha": True}, dict, "lora_alpha"),
    "alpha NaN": ({"lora_alpha": math.nan}, dict, "lora_alpha"),
    "alpha null": ({"lora_alpha": None}, dict, "lora_alpha"),
    "rank list": ({"r": [4]}, dict, "r = "),
    "alpha_pattern a list": ({"alpha_pattern": ["q_proj"]}, dict, "alpha_pattern"),
    "alpha_pattern text": ({"alpha_pattern": {"q_proj": "4"}}, dict, "alpha_pattern"),
    "alpha_pattern no expression": ({"alpha_pattern": {"(": 4}}, dict, "alpha_pattern"),
    "config a list": ({"": "list"}, dict, "holds a JSON list"),
    "NaN": ({}, lambda s: s[f"{L0}.lora_A.weight"].fill_(math.nan), "not finite"),
    "all zero": ({}, lambda s: [t.zero_() for t in s.values()], "no tensor changed"),
    "empty": ({}, lambda s: s.clear(), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters(adapters, tmp_path: Path, case: str) -> None:
    changes, change, message = BROKEN[case]
    pair, adapter, _, _ = adapters("plain")
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps([] if "" in changes else config))
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(pair.base, tmp_path, rank=2)
    if case == "all zero":  # merged, it gives the base
        return
    with pytest.raises(AdaptError, match=message):
        adapt_convert.merge(pair.base, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_real_adapters_of_another_base(pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    pairs("gpt2").save_adapter(ADAPTERS["GPT-2, fan_in_fan_out"][1], tmp_path / "other")
    pairs("bert").save_adapter(LoHaConfig(r=2, target_modules=["query"]), tmp_path / "loha")
    for name in ("other", "loha"):
        with pytest.raises(AdaptError, match=r"in common|is this the right base"):
            adapt_convert.convert(pair.base, tmp_path / name)
