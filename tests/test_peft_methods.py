"""Adapters of every PEFT method that merges into weights: made by `peft`, converted at full rank, held against its own merge."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.convert.opening import open_pair
from adapt_convert.formats.errors import AdaptError

TWO = {"target_modules": ["q_proj", "down_proj"]}  # of different shapes
FULL = 48  # above every dimension of the tiny models


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **TWO} | options)


def quietly(make: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(**options)


METHODS: dict[str, tuple[str, Any]] = {
    "AdaLoRA": ("qwen2", peft.AdaLoraConfig(total_step=10, init_r=4, target_r=2, **TWO)),
    "BOFT": ("qwen2", peft.BOFTConfig(boft_block_size=4, **TWO)),
    "C3A": ("qwen2", peft.C3AConfig(block_size=8, **TWO)),
    "DeLoRA": ("qwen2", peft.DeloraConfig(**TWO)),
    "FourierFT": ("qwen2", peft.FourierFTConfig(n_frequency=20, **TWO)),
    "GLoRA": ("qwen2", peft.GloraConfig(target_modules=["q_proj", "k_proj"])),
    "GraLoRA": ("qwen2", peft.GraloraConfig(r=4, **TWO)),
    "HiRA": ("qwen2", peft.HiraConfig(**TWO)),
    "HRA": ("qwen2", peft.HRAConfig(**TWO)),
    "IA3": ("qwen2", peft.IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=["q_proj"])),
    "LN tuning": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "LoHa": ("qwen2", peft.LoHaConfig(r=3, alpha=5, rank_pattern={"q_proj": 2}, **TWO)),
    "LoKr": ("qwen2", peft.LoKrConfig(r=3, alpha=5, **TWO)),
    "MiSS": ("qwen2", peft.MissConfig(r=4, **TWO)),
    "OFT": ("qwen2", peft.OFTConfig(r=0, oft_block_size=8, **TWO)),
    "PSOFT": ("llama", peft.PsoftConfig(**TWO)),
    "PVeRA": ("qwen2", peft.PveraConfig(r=6, **TWO)),
    "RandLoRA": ("qwen2", peft.RandLoraConfig(r=4, **TWO)),
    "SHiRA": ("qwen2", peft.ShiraConfig(r=2, **TWO)),
    "VBLoRA": ("qwen2", peft.VBLoRAConfig(r=2, topk=2, num_vectors=8, vector_length=8, **TWO)),
    "VeRA": ("qwen2", peft.VeraConfig(r=6, **TWO)),
    "VeRA, projections drawn anew": ("qwen2", quietly(peft.VeraConfig, r=6, save_projection=False, **TWO)),
    "WaveFT": ("qwen2", peft.WaveFTConfig(n_frequency=20, **TWO)),
    "DoRA": ("qwen2", lora(use_dora=True)),
    "DoRA with rsLoRA and a pattern": ("qwen2", lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2})),
    "DoRA of GPT-2": ("gpt2", lora(use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "DoRA of an embedding": ("llama", lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    "DoRA and modules_to_save": ("llama", lora(use_dora=True, modules_to_save=["norm", "lm_head"])),
    "DoRA of a convolution": ("vit", lora(use_dora=True, target_modules=["projection", "fc1"])),
    "LoHa and modules_to_save": ("llama", peft.LoHaConfig(r=2, modules_to_save=["norm"], **TWO)),
    "PiSSA": ("llama", lora(init_lora_weights="pissa")),
    "OLoRA": ("llama", lora(init_lora_weights="olora")),
}  # fmt: skip


def merged_by_peft(pair: Any, directory: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pair.load_peft(directory).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_at_full_rank_it_is_what_peft_merges(pairs, tmp_path: Path, name: str) -> None:
    model, config = METHODS[name]
    pair = pairs(model)
    pair.save_adapter(config, tmp_path / "adapter")
    theirs, base = merged_by_peft(pair, tmp_path / "adapter"), pair.load(pair.base).state_dict()
    changed = {key for key, value in theirs.items() if not torch.equal(value, base[key])}
    assert changed

    adapt_convert.merge(pair.base, tmp_path / "adapter", tmp_path / "merged")
    ours = pair.load(tmp_path / "merged").state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=2e-6, rtol=2e-6, msg=lambda text, key=key: f"{key}: {text}")

    if name == "LN tuning":  # norm gains alone: nothing to factor
        with pytest.raises(AdaptError, match="no matrix is left to convert"):
            adapt_convert.convert(pair.base, tmp_path / "adapter", rank=FULL)
        return
    conversion = adapt_convert.convert(pair.base, tmp_path / "adapter", rank=FULL)
    out = conversion.save(tmp_path / "lora")
    assert conversion.report["captured_energy_of_all_changes"] > 1 - 1e-6
    again = merged_by_peft(pair, out)
    for key in changed:
        torch.testing.assert_close(again[key], theirs[key], atol=5e-6, rtol=5e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_dora_reports_what_its_factors_hold_without_the_magnitude(pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    pair.save_adapter(lora(use_dora=True), tmp_path / "dora")
    report = adapt_convert.convert(pair.base, tmp_path / "dora", rank=4).report
    state, base = load_file(tmp_path / "dora" / "adapter_model.safetensors"), load_file(pair.base / "model.safetensors")
    theirs = merged_by_peft(pair, tmp_path / "dora")
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj"
        change = (theirs[f"{name}.weight"] - base[f"{name}.weight"]).double()
        a, b = (state[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        expected = 1 - ((change - b @ a * 6 / 4).square().sum() / change.square().sum()).item()
        row = report["tensors"][f"{name}.weight"]
        assert row["captured_energy_without_magnitude"] == pytest.approx(expected, abs=1e-4)
        assert row["captured_energy"] > row["captured_energy_without_magnitude"]  # the SVD of the whole change knows of the magnitude


def test_only_one_module_is_built_at_a_time(pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("qwen2")
    pair.save_adapter(METHODS["LoHa"][1], tmp_path / "adapter")
    _, source = open_pair(pair.base, tmp_path / "adapter")
    built: list[int] = []
    real = peft.get_peft_model

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        built.append(sum(parameter.numel() for parameter in model.parameters()))
        return real(model, *args, **options)

    monkeypatch.setattr(peft, "get_peft_model", watched)
    source.parts["model.layers.1.self_attn.q_proj.weight"].load()
    assert built == [32 * 32 + 32]


@pytest.mark.parametrize("target", ["lorta", "latte"])
def test_other_targets_take_them_too(pairs, tmp_path: Path, target: str) -> None:
    pair = pairs("llama")
    pair.save_adapter(peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    conversion = adapt_convert.convert(pair.base, tmp_path / "adapter", to=target, rank=8 if target == "lorta" else 32)
    live = adapt_convert.load(pair.load(pair.base), conversion.save(tmp_path / "out"))
    before, theirs = pair.logits(pair.load(pair.base)), pair.logits(pair.load_peft(tmp_path / "adapter"))
    closer = (pair.logits(live) - theirs).norm() / (before - theirs).norm()
    assert closer < (0.75 if target == "lorta" else 1e-4)  # a LatTE as wide as the stream is exact


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"peft_type": "NOSUCH"}, "peft_type = 'NOSUCH', which the installed peft does not know"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "is a PEFT PROMPT_TUNING adapter, which is no change of weights"),
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "is a PEFT PREFIX_TUNING adapter, which is no change of weights"),
    "X-LoRA": ({"peft_type": "XLORA"}, "is a PEFT XLORA adapter, which is no change of weights"),
    "FRoD": ({"peft_type": "FROD"}, "FROD adapter, whose modules depend on each other"),
    "activated LoRA": ({"peft_type": "LORA", "alora_invocation_tokens": [1, 2]}, "acts on some tokens only"),
    "replicated": ({"layer_replication": [[0, 1]]}, "has layer_replication"),
    "no number": ({"r": "three"}, "peft cannot"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_delta_is_refused_by_name(pairs, tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    pair = pairs("qwen2")
    pair.save_adapter(peft.LoHaConfig(r=2, **TWO), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(pair.base, tmp_path / "adapter", rank=2)


L0 = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "half of it": (lambda s: s.pop(f"{L0}.hada_w1_a"), "lacks"),
    "another shape": (lambda s: s.update({f"{L0}.hada_w1_a": torch.ones(32, 9)}), "peft cannot merge model.layers.0.self_attn.q_proj"),
    "more than it has": (lambda s: s.update({f"{L0}.hada_w9": torch.ones(3)}), "no place for"),
    "another base": (lambda s: s.update({f"{L0.replace('.0.', '.9.')}.hada_w1_a": torch.ones(32, 2)}), "does not have"),
    "empty": (lambda s: s.clear(), "no tensors"),
    "not finite": (lambda s: s[f"{L0}.hada_w1_a"].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters(pairs, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    pair = pairs("qwen2")
    pair.save_adapter(peft.LoHaConfig(r=2, **TWO), tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(pair.base, tmp_path / "adapter", rank=2)
