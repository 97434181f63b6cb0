"""What the servers that run on no CPU make of a PEFT directory, written down from their own sources.

Each function takes a directory and returns the change of every matrix as the server would apply it, `(out, in)` float64 by module,
or raises `Refused`. They know nothing of the profiles that are tested against them.
- vLLM 0.32: `vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `vllm/config/lora.py`
- SGLang 0.5: `python/sglang/srt/lora/lora.py`, `lora_config.py`
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
    expected = LINEAR | ({"embed_tokens", "lm_head"} if model_type in ("llama", "mistral") else set())
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise Refused("modules_to_save, DoRA or bias")
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
    weights = dict(tensors)
    for stack in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in [name for name in weights if f".{stack[0]}." in name]:
            for other in stack[1:]:
                if name.replace(stack[0], other) not in weights:  # torch.cat of what is not there
                    raise Refused(f"KeyError: {name.replace(stack[0], other)}")
        for name in [name for name in weights if any(f".{other}." in name for other in stack[1:])]:
            own = next(other for other in stack if f".{other}." in name)
            if name.replace(own, stack[0]) not in weights:  # stays outside the stack, where no layer looks for it
                raise Refused(f"{name} without {stack[0]}")
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
        if match[9] or config.get("use_dora"):
            raise Refused("DoRA")  # runs only where the engine was built for it
        halves.setdefault(name.split(".lora_")[0].removeprefix("base_model.model."), {})[match[8]] = value
    deltas = {}
    for module, half in halves.items():
        rank = half["A"].shape[0]
        deltas[module] = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank) * (half["B"] @ half["A"])
    return deltas


SERVERS: dict[str, Callable[[Path, str], Deltas]] = {"vllm": vllm, "sglang": sglang, "tensorrt-llm": tensorrt_llm}
