"""What servers make of a PEFT directory, written down from their own sources; test_vllm.py has vLLM itself.

Each function takes a directory and returns the change of every matrix as the server would apply it, `(out, in)` float64 by module,
or raises `Refused`. They know nothing of the profiles that are tested against them.
- vLLM 0.32: `vllm/lora/peft_helper.py`, `lora_model.py`, `model_manager.py`, `lora_weights.py`, `utils.py`, `vllm/config/lora.py`; but the
  scale is that of the releases before, which read no patterns
- SGLang 0.5.23: `python/sglang/srt/lora/lora.py`, `lora_config.py`, `mem_pool.py`, `utils.py`
- TensorRT-LLM 1.0: `tensorrt_llm/lora_manager.py`, `lora_helper.py`
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Deltas = dict[str, torch.Tensor]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Refused(Exception):  # noqa: N818
    """The server would not load this."""


def _open(directory: Path) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, {name: value.double() for name, value in load_file(directory / "adapter_model.safetensors").items()}


def vllm(directory: Path, model_type: str) -> Deltas:
    config, tensors = _open(directory)
    expected = LINEAR | ({"embed_tokens", "lm_head"} if model_type in ("llama", "qwen3", "qwen3_moe") else set())
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise Refused("modules_to_save, DoRA or bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        raise Refused("starts in the base")
    if not {"r", "lora_alpha", "target_modules"} <= set(config):
        raise Refused("missing required configuration fields")
    if config["r"] > 512:
        raise Refused("max_lora_rank")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith("base_layer.weight"):
            continue
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, half = ".".join(parts[:-2]), parts[-2][-1]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, half = ".".join(parts[:-1]), parts[-1][-1]
        else:
            raise Refused(f"{name} is unsupported LoRA weight")
        if module.rsplit(".", 1)[-1] not in expected:
            raise Refused(f"expected target modules in {expected} but received {module}")
        halves.setdefault(module, {})[half] = value
    for module, half in halves.items():
        if half["A"].shape[0] > config["r"]:  # the server's buffers are as large as max_lora_rank, which is chosen by `r`
            raise Refused(f"{module} has a rank above r")
    for stack in {module.rpartition(".experts.")[0] for module in halves if ".experts." in module}:
        numbers = {module.split(".experts.")[1].split(".")[0] for module in halves if module.startswith(f"{stack}.experts.")}
        # The packing asserts w1, w2 and w3 of every expert of the model, which an adapter alone does not tell the number of.
        for number in map(str, range(1 + max(map(int, numbers)))):
            if any(f"{stack}.experts.{number}.{name}" not in halves for name in ("gate_proj", "up_proj", "down_proj")):
                raise Refused(f"AssertionError: expert {number} of {stack}")
    return {module: scale * (half["B"] @ half["A"]) for module, half in halves.items()}


def sglang(directory: Path, model_type: str) -> Deltas:
    config, tensors = _open(directory)
    tensors = {
        name: value for name, value in tensors.items() if not name.endswith(("lm_head.base_layer.weight", "embed_tokens.base_layer.weight"))
    }
    if config.get("use_dora") or isinstance(config["target_modules"], str):
        raise Refused("DoRA or target_modules as an expression")
    if any("lora_" not in name for name in tensors) or any("bias" in name or "magnitude" in name for name in tensors):
        raise Refused("holds more than factors")
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    if any(value.shape[0] != rank for name, value in tensors.items() if name.endswith(("lora_A.weight", "lora_embedding_A"))):
        raise Refused("rank must equal r")
    if any(name.split(".lora_")[0].rsplit(".", 1)[-1] not in LINEAR | {"embed_tokens", "lm_head"} for name in tensors):
        raise Refused("get_hidden_dim not implemented")
    weights = dict(tensors)
    for name in [name for name in weights if ".q_proj." in name]:  # k is made up of zeros where no layer has it
        if name.replace("q_proj", "v_proj") not in weights:
            raise Refused(f"KeyError: {name.replace('q_proj', 'v_proj')}")
    for stacked, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
        for own in others:
            for name in [name for name in weights if f".{own}." in name]:
                if name.replace(own, stacked) not in weights:  # stays outside the stack, where its name is none of the targets
                    raise Refused(f"Cannot find target module name for {name}")
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}
    if any(".experts." in name for name in tensors) and not {"gate_proj", "down_proj"} <= kinds:  # no layer of experts is wrapped
        weights = {name: value for name, value in weights.items() if ".experts." not in name}
    return {
        name.split(".lora_")[0].removeprefix("base_model.model."): scale * (weights[_other_half(name)] @ value)
        for name, value in weights.items()
        if name.endswith(("lora_A.weight", "lora_embedding_A"))
    }


def _other_half(name: str) -> str:
    return name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


_TENSORRT = re.compile(r"(.*)\.(\d+)\.(\w+)\.(\w+|\w+\.\w+|(\w+)\.(\d+)\.(\w+))\.lora_(?:(A|B)\.weight|(magnitude)_vector)")


def tensorrt_llm(directory: Path, model_type: str) -> Deltas:
    config, tensors = _open(directory)
    if config.get("modules_to_save"):
        raise Refused("vocabulary of the adapter's own")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        match = _TENSORRT.fullmatch(name)
        if not match:
            if "lm_head" not in name and "embed_tokens" not in name:
                raise Refused(f"KeyError: unsupported key {name}")
            continue
        if (match[7] or match[4]) not in LINEAR | {"gate_up_proj", "w1", "w2", "w3"}:
            raise Refused(f"hf_module {match[4]} is not in supported list")
        if match[9] or config.get("use_dora"):
            raise Refused("DoRA")  # runs only where the engine was built for it
        halves.setdefault(name.split(".lora_")[0].removeprefix("base_model.model."), {})[match[8]] = value
    deltas = {}
    for module, half in halves.items():
        rank = half["A"].shape[0]
        deltas[module] = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank) * (half["B"] @ half["A"])
    return deltas


SERVERS: dict[str, Callable[[Path, str], Deltas]] = {"vllm": vllm, "sglang": sglang, "tensorrt-llm": tensorrt_llm}
