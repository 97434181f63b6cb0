"""`lint` on adapters that PEFT itself has written: it finds something exactly where a server would refuse or run another model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from servers import SERVERS, Refused
from test_consumers import assert_same, peft_deltas

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

from adapt_convert import AdaptError, convert, lint
from adapt_convert.cli import main

QV, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADE: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "alpha is twice the rank": {"target_modules": ALL, "lora_alpha": 16},
    "q and v": {"target_modules": QV},
    "q alone": {"target_modules": ["q_proj"]},
    "gate alone": {"target_modules": ["gate_proj"]},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 4},
    "a rank pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 4}},
    "an alpha pattern": {"target_modules": ALL, "alpha_pattern": {"down_proj": 32}},
    "patterns that say nothing": {"target_modules": ALL, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8}},
    "both patterns": {"target_modules": ALL, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "whole modules": {"target_modules": ALL, "modules_to_save": ["norm"]},
    "biases": {"target_modules": ALL, "bias": "all"},
    "biases of LoRA": {"target_modules": ALL, "lora_bias": True},
    "the head": {"target_modules": [*ALL, "lm_head"]},
    "the embeddings": {"target_modules": [*ALL, "embed_tokens"]},
    "an expression": {"target_modules": r".*\.(q_proj|k_proj|v_proj)"},
}


def make(pair: Any, directory: Path, options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            pair.load(pair.base), peft.LoraConfig(**{"r": 8, "lora_alpha": 8, "init_lora_weights": False} | options)
        )
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("case", MADE)
def test_lint_agrees_with_the_servers(case: str, name: str, pairs: Any, tmp_path: Path) -> None:
    pair = pairs(name)
    adapter = make(pair, tmp_path / "adapter", MADE[case])
    assert lint(adapter, "peft") == []
    expected = _oriented(peft_deltas(pair, adapter))
    for server, load in SERVERS.items():
        try:
            fits = not _differ(load(adapter, name), expected)
        except Refused:
            fits = False
        assert (lint(adapter, server) == []) is fits, (server, [str(finding) for finding in lint(adapter, server)])


def _oriented(deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: delta.T if name.endswith("embed_tokens") else delta for name, delta in deltas.items()}


def _differ(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    try:
        assert_same(given, expected)
    except AssertionError:
        return True
    return False


def configured(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def unconfigured(key: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))

    return edit


Q, MLP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.mlp"
EDITS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another method": (configured(peft_type="VERA"), "vllm", "refused: vLLM loads LoRA alone, and this is VERA; convert it"),
    "rank": (configured(r=4), "peft", "refused: .*_proj has rank 8 where PEFT expects r = 4"),
    "no alpha": (configured(lora_alpha=0), "vllm", "refused: adapter_config.json has lora_alpha = 0, which makes no sense"),
    "no alpha at all": (unconfigured("lora_alpha"), "vllm", "refused: vLLM wants lora_alpha in adapter_config.json, which does not say it"),
    "PiSSA": (configured(init_lora_weights="pissa_niter_4"), "vllm", "refused: vLLM does not take init_lora_weights 'pissa_niter_4'"),
    "PiSSA elsewhere": (configured(init_lora_weights="pissa"), "sglang", "wrong: SGLang leaves in the base what init_lora_weights 'pissa'"),
    "activated": (configured(alora_invocation_tokens=[1]), "vllm", "refused: vLLM does not know alora_invocation_tokens; run it in PEFT"),
    "activated elsewhere": (configured(alora_invocation_tokens=[1]), "sglang", "wrong: SGLang does not know alora_invocation_tokens"),
    "stacks": (configured(target_parameters=["mlp.experts.down_proj"]), "sglang", "refused: SGLang takes no stacks of experts"),
    "other names": (
        with_tensors(lambda t: t.update({f"{MLP}.fc1.lora_A.weight": torch.ones(8, 32), f"{MLP}.fc1.lora_B.weight": torch.ones(32, 8)})),
        "tensorrt-llm",
        "refused: TensorRT-LLM adapts no matrix of the name of model.layers.0.mlp.fc1",
    ),
    "layers twice": (configured(layer_replication=[[0, 1]]), "sglang", "refused: SGLang does not know layer_replication"),
    "Conv1D": (configured(fan_in_fan_out=True), "vllm", "refused: vLLM has no LoRA for matrices stored"),
    "one half": (with_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "vllm", "refused: model.layers.0.self_attn.q_proj has only one half"),
    "a norm that PEFT ignores": (
        with_tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)})),
        "peft",
        "lost: PEFT ignores model.norm.weight, which modules_to_save does not list; list its module",
    ),
    "a bias that PEFT ignores": (
        with_tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)})),
        "peft",
        "lost: PEFT ignores .*q_proj.lora_B.bias without lora_bias",
    ),
    "a token's own row": (
        with_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)})),
        "vllm",
        "refused: vLLM loads no vocabulary of the adapter's own",
    ),
    "too large": (
        with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(600, 32), f"{Q}.lora_B.weight": torch.ones(32, 600)})),
        "vllm",
        "refused: rank 600 is above vLLM's largest, 512; convert it: .* --for vllm --rank 512",
    ),
    "PEFT for Diffusers": (lambda directory: None, "diffusers", "lost: .* base_model.model.*runs diffusion models alone"),
    "PEFT for Kohya": (lambda directory: None, "kohya", "refused: kohya's form knows no tensor base_model.model"),
    "PEFT for llama.cpp": (lambda directory: None, "llama.cpp", "refused: llama.cpp loads GGUF files, and there is none; convert it: "),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_findings(case: str, pairs: Any, tmp_path: Path) -> None:
    edit, consumer, message = EDITS[case]
    adapter = make(pairs("llama"), tmp_path / "adapter", MADE["plain"])
    edit(adapter)
    done = CliRunner().invoke(main, ["lint", str(adapter), "--for", consumer])
    assert done.exit_code == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("FAIL ") for line in lines)
    assert any(re.search(message, line) for line in lines), lines


def test_a_release_that_differs_is_named(pairs: Any, tmp_path: Path) -> None:
    (finding,) = lint(make(pairs("llama"), tmp_path / "adapter", MADE["an alpha pattern"]), "vllm")
    assert "scaled by 4, and vLLM before 0.32 takes 1" in str(finding)


def test_the_command_in_json_and_when_nothing_is_found(pairs: Any, tmp_path: Path) -> None:
    adapter = make(pairs("llama"), tmp_path / "adapter", MADE["q alone"])
    clean = CliRunner().invoke(main, ["lint", str(adapter), "--for", "vllm", "--json"])
    assert clean.exit_code == 0
    assert json.loads(clean.stdout) == {"adapter": str(adapter), "profile": "vllm", "findings": []}
    assert "nothing found against vllm" in CliRunner().invoke(main, ["lint", str(adapter), "--for", "vllm"]).stdout
    found = CliRunner().invoke(main, ["lint", str(adapter), "--for", "sglang", "--json"])
    assert found.exit_code == 1
    (finding,) = json.loads(found.stdout)["findings"]
    assert finding["effect"] == "refused"
    assert finding["what"] == "SGLang wants v_proj adapted beside model.layers.0.self_attn.q_proj"


def test_what_is_no_adapter_is_refused(pairs: Any, tmp_path: Path) -> None:
    for path, consumer, message in (
        (pairs("llama").base, "vllm", "has no adapter_config.json"),
        (tmp_path / "nowhere", "vllm", "no such file or directory"),
        (tmp_path, "kohya", "no model.safetensors"),
        (tmp_path, "ollama", "unknown consumer"),
    ):
        with pytest.raises(AdaptError, match=message):
            lint(path, consumer)


@pytest.mark.parametrize("case", ["alpha is twice the rank", "q alone", "rsLoRA", "a rank pattern", "an alpha pattern", "whole modules"])
def test_the_remedy_works(case: str, pairs: Any, tmp_path: Path) -> None:
    """`delta BASE ADAPTER --for SERVER`, as a finding says, makes an adapter that the server runs as PEFT ran the first one."""
    pair = pairs("llama")
    adapter = make(pair, tmp_path / "adapter", MADE[case])
    expected = peft_deltas(pair, adapter)
    for server, load in SERVERS.items():
        convert(pair.base, adapter, profile=server).save(tmp_path / server)
        assert lint(tmp_path / server, server) == []
        assert_same(load(tmp_path / server, "llama"), expected)


def test_kohya_files_under_diffusers(tmp_path: Path) -> None:
    def write(*alphas: float) -> None:
        tensors = {}
        for number, alpha in enumerate(alphas):
            name = f"lora_unet_down_blocks_{number}_attentions_0_proj_in"
            tensors |= {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
            tensors |= {f"{name}.alpha": torch.tensor(alpha)}
        save_file(tensors, tmp_path / "lora.safetensors")

    write(2.0, 2.0)
    assert lint(tmp_path, "diffusers") == lint(tmp_path, "kohya") == lint(tmp_path / "lora.safetensors", "diffusers") == []
    write(2.0, 1.0)
    assert "wrong: alphas from 1 to 2" in str(lint(tmp_path, "diffusers")[0])
    assert lint(tmp_path, "kohya") == []


def test_what_peft_does_not_know_is_refused_for_it_too(pairs: Any, tmp_path: Path) -> None:
    """Held against PEFT's own table of methods; a LoRTA can be converted as the line says, a LoDA cannot."""
    pair = pairs("llama")
    out = convert(pair.base, pair.ft, to="lorta", rank=2).save(tmp_path / "lorta")
    (finding,) = lint(out, "peft")
    assert finding.effect == "refused"
    assert f"delta BASE {out} --for peft" in finding.remedy
    convert(pair.base, out, profile="peft", rank=2)
    config = json.loads((out / "adapter_config.json").read_text())
    for method, known in (("LODA", False), ("LORTA", False), ("LOHA", True), ("VERA", True)):
        assert (method in peft.PEFT_TYPE_TO_CONFIG_MAPPING) == known
        (out / "adapter_config.json").write_text(json.dumps(config | {"peft_type": method}))
        assert (lint(out, "peft") == []) == known
        assert "loads LoRA alone" in lint(out, "vllm")[0].what
    (out / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LODA"}))
    for name in ("peft", "vllm", "llama.cpp", "diffusers", "kohya"):
        assert f"the fine-tune it was made from: adapt-convert delta BASE FT --for {name}" in lint(out, name)[0].remedy
