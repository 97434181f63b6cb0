"""What every written format is, to the byte: adapters made by hand, of numbers that are exact in every dtype.

The GGUF adapter and one-module LoRAs have theirs in test_gguf.py and test_lora_files.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import adapt_convert
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.families import BY_MODEL_TYPE
from adapt_convert.convert.lorta.cp_tensor import CPFactors
from adapt_convert.formats import checkpoint_writer
from adapt_convert.formats.image_lora import ImageLora
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix
from adapt_convert.formats.lorta import LortaAdapter, LortaBlock, Slot
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.shared_lora import SharedLoraAdapter, SharedTask, Subspaces

Q, OUT, UP = (f"model.layers.0.{module}" for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
NORM = "model.norm.weight"


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape) / 8


def low_rank(out: int, rank: int, into: int) -> LowRankDelta:
    return LowRankDelta(counted(out, rank), counted(rank, into))


def lora() -> LoraAdapter:
    """Two ranks, a changed bias and a module that is stored whole."""
    return LoraAdapter(
        factors={Q: low_rank(4, 2, 6), OUT: low_rank(6, 1, 4)},
        biases={Q: counted(4)},
        exact={NORM: counted(6)},
        exact_modules=["model.norm"],
        all_modules=[Q, OUT, "model.norm"],
        base_model="base",
        task_type="CAUSAL_LM",
    )


def experts(family: str, factors: dict[str, LowRankDelta]) -> LoraAdapter:
    return LoraAdapter(factors, experts=BY_MODEL_TYPE[family].experts, all_modules=sorted(factors), base_model="base")


def stacked_experts() -> LoraAdapter:
    """One expert has factors of rank 2, the other of rank 1; biases of all experts are one matrix."""
    stack = "model.layers.0.mlp.experts"
    return experts(
        "gpt_oss",
        {
            **{f"{stack}.{number}.gate_up_proj": low_rank(8, 2 - number, 4) for number in range(2)},
            **{f"{stack}.{number}.down_proj": low_rank(4, 1, 4) for number in range(2)},
            f"{stack}.gate_up_proj_bias": low_rank(2, 1, 8),
        },
    )


def experts_one_by_one() -> LoraAdapter:
    start = "model.layers.0.block_sparse_moe.experts"
    shapes = {"w1": (8, 4), "w3": (8, 4), "w2": (4, 8)}
    return experts("mixtral", {f"{start}.{n}.{w}": low_rank(out, 2, into) for n in range(2) for w, (out, into) in shapes.items()})


def image_lora(style: Any) -> ImageLora:
    """Of a pipeline: a matrix and a convolution of its UNet, and a matrix of its text encoder."""
    names = {
        "diffusers": ("unet.mid.to_q", "unet.mid.conv1", "text_encoder.layers.0.fc1"),
        "kohya": ("lora_unet_mid_to_q", "lora_unet_mid_conv1", "lora_te_text_model_layers_0_fc1"),
    }[style]
    modules = ("unet.mid.to_q", "unet.mid.conv1", "text_encoder.layers.0.fc1")
    factors = dict(zip(modules, (low_rank(4, 2, 6), low_rank(4, 2, 27), low_rank(8, 2, 4)), strict=True))
    adapter = LoraAdapter(factors, kernels={modules[1]: (3, 3, 3)}, all_modules=list(modules), base_model="pipe")
    return ImageLora(adapter, dict(zip(modules, names, strict=True)), style)


def lorta() -> LortaAdapter:
    """q, k and v in one weight by groups of heads, of which there are fewer for k and v; and an MLP."""
    fused = "model.layers.0.attn.qkv"
    attention = LortaBlock(
        "attention",
        CPFactors(counted(6, 2), counted(2, 2), (counted(4, 2), counted(2, 2)), counted(1, 2), counted(4, 2)),
        (0, 1, 1, 0),
        (Slot(fused, 0, 0, True, 0, 4, 8), Slot(fused, 0, 1, True, 4, 6, 8), Slot(fused, 0, 2, True, 6, 8, 8), Slot(OUT, 0, 3, False)),
    )
    mlp = LortaBlock(
        "mlp", CPFactors(counted(6, 2), counted(8, 2), (counted(1, 2),), counted(1, 2), counted(1, 2)), (0,), (Slot(UP, 0, 0, True),)
    )
    return LortaAdapter([attention, mlp], torch.bfloat16, exact={NORM: counted(6)}, base_model="base", task_type="CAUSAL_LM")


def latte() -> LatteAdapter:
    task = LatteTask("ft")
    task.readers[Q], task.writers[OUT], task.biases[Q], task.exact[NORM] = counted(4, 2), counted(2, 4), counted(4), counted(6)
    hashes = {Q: {"bfloat16": "0" * 16, "float16": "1" * 16, "stored": "bfloat16"}}
    return LatteAdapter("llama", [Segment(0, 1, torch.eye(6)[:, :2])], [task], hashes, base_model="base", task_type="CAUSAL_LM")


def latte_score() -> LatteAdapter:
    task = LatteTask("ft")
    for letter in "qkv":
        task.scores |= {f"transformer.h.0.attn.{letter}_A": counted(1, 6), f"transformer.h.0.attn.{letter}_B": counted(6, 1)}
    return LatteAdapter("gpt2", [], [task], {}, construction="score", base_model="base")


def loda() -> LodaAdapter:
    keep = torch.arange(24).reshape(4, 6) % 3 == 0
    full = LodaMatrix(counted(2, 6), counted(4, 2), (counted(2, 2), counted(2, 2)), counted(4), None, keep)
    plain = LodaMatrix(counted(1, 4), counted(6, 1), None, None, None, None)
    return LodaAdapter("s-loda+", {Q: full, OUT: plain}, torch.float16, {NORM: counted(6)}, keep=1 / 3, base_model="base")


def shared_lora() -> SharedLoraAdapter:
    tasks = [SharedTask("a", {Q: counted(2, 1), OUT: counted(1, 1)}), SharedTask("b", {Q: counted(2, 1)})]
    return SharedLoraAdapter({Q: Subspaces(counted(4, 2), counted(1, 6)), OUT: Subspaces(counted(6, 1), counted(1, 4))}, tasks, "base")


WRITTEN: dict[str, Any] = {
    "PEFT LoRA": lora,
    "experts in stacks": stacked_experts,
    "experts one by one": experts_one_by_one,
    "diffusers, of a pipeline": lambda: image_lora("diffusers"),
    "kohya, of a pipeline": lambda: image_lora("kohya"),
    "LoRTA": lorta,
    "LatTE": latte,
    "LatTE, score": latte_score,
    "LoDA": loda,
    "shared LoRA": shared_lora,
}
GOLDEN: dict[str, dict[str, str]] = {
    "PEFT LoRA": {
        "adapter_config.json": "82607baf4ba05e6f",
        "adapter_model.safetensors": "4fd18d143982544a",
    },
    "experts in stacks": {
        "adapter_config.json": "5188648bb2a50306",
        "adapter_model.safetensors": "dccefadac152b4e2",
    },
    "experts one by one": {
        "adapter_config.json": "dd360b684fbea4d1",
        "adapter_model.safetensors": "1f0d6a9558c16b55",
    },
    "diffusers, of a pipeline": {
        "pytorch_lora_weights.safetensors": "6fe0cf1c35b95385",
    },
    "kohya, of a pipeline": {
        "lora.safetensors": "361dfa73d7f5d23a",
    },
    "LoRTA": {
        "adapter_config.json": "0d53a5a275866c68",
        "adapter_model.safetensors": "2d29768842c74871",
    },
    "LatTE": {
        "latte.safetensors": "fcb481d39b9c9ae4",
        "latte_config.json": "8ad5ffb3da5745c6",
    },
    "LatTE, score": {
        "latte.safetensors": "c87387d35049731a",
        "latte_config.json": "3de1a128d93c89ca",
    },
    "LoDA": {
        "adapter_config.json": "49f6a661170f7bf0",
        "adapter_model.safetensors": "c9fd00964f90033f",
    },
    "shared LoRA": {
        "shared_lora.safetensors": "66239c2c3b943255",
        "shared_lora_config.json": "b6b403b64adc957e",
    },
    "merged pipeline": {
        "model_index.json": "4b651116ef178471",
        "text_encoder/config.json": "6066fde95b52e231",
        "text_encoder/model.safetensors": "cae2251e92a8b7bb",
        "unet/config.json": "7dadfc86254a8e3f",
        "unet/diffusion_pytorch_model.safetensors": "4b86e3c7e9b57308",
        "vae/config.json": "7dadfc86254a8e3f",
        "vae/diffusion_pytorch_model.safetensors": "9484f3f6c23ab25c",
    },
    "merged checkpoint": {
        "config.json": "9df57d6e40ca7e5c",
        "model.safetensors": "986c2c77ff896152",
    },
    "merged checkpoint in shards": {
        "config.json": "9df57d6e40ca7e5c",
        "model-00001-of-00002.safetensors": "3c22878490fa8f2a",
        "model-00002-of-00002.safetensors": "9d3132a63eadd413",
        "model.safetensors.index.json": "22aa35e8c3f966c0",
    },
}


def hashes_of(directory: Path) -> dict[str, str]:
    """The start of every file's SHA-256, by its path below `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


@pytest.mark.parametrize("case", WRITTEN)
def test_adapters(tmp_path: Path, case: str) -> None:
    adapter = WRITTEN[case]()
    size = adapter.write(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    expected = {name: value.contiguous() for name, value in adapter.tensors().items()}
    assert weights.read_bytes() == save(expected, {"format": "pt"})
    assert len(weights.read_bytes()) == size
    assert hashes_of(tmp_path) == GOLDEN[case]


# Merged checkpoints, over a LoRA that changes one matrix in each.

PIPE = {"unet": ("diffusers", "mid.to_q"), "text_encoder": ("transformers", "layers.0.fc1"), "vae": ("diffusers", "decoder.to_k")}


def make_pipeline(directory: Path) -> None:
    """The files of a pipeline, of one matrix in each component."""
    directory.mkdir()
    index = {"_class_name": "StableDiffusionPipeline"} | {name: [library, "Model"] for name, (library, _) in PIPE.items()}
    (directory / "model_index.json").write_text(json.dumps(index))
    for name, (library, module) in PIPE.items():
        (directory / name).mkdir()
        config = {"_class_name": "Model"} if library == "diffusers" else {"model_type": "clip_text_model"}
        (directory / name / "config.json").write_text(json.dumps(config))
        file = "model" if library == "transformers" else "diffusion_pytorch_model"
        weights = {f"{module}.weight": counted(4, 6).to(torch.float16), f"{module}.bias": counted(4)}
        save_file(weights, directory / name / f"{file}.safetensors", {"format": "pt"})


def test_a_merged_pipeline(tmp_path: Path) -> None:
    make_pipeline(tmp_path / "base")
    factors = {f"{name}.{PIPE[name][1]}": low_rank(4, 1, 6) for name in ("unet", "text_encoder")}
    names = {module: module for module in factors}
    (tmp_path / "lora").mkdir()
    ImageLora(LoraAdapter(factors), names, "diffusers").write(tmp_path / "lora")
    adapt_convert.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    for name, (library, module) in PIPE.items():
        file = tmp_path / "merged" / name / ("model" if library == "transformers" else "diffusion_pytorch_model")
        change = low_rank(4, 1, 6).dense() if name != "vae" else torch.zeros(4, 6)
        weights = {f"{module}.weight": (counted(4, 6) + change).to(torch.float16), f"{module}.bias": counted(4)}
        assert file.with_suffix(".safetensors").read_bytes() == save(weights, {"format": "pt"})
    (tmp_path / "merged" / "conversion.json").unlink()  # names the paths of this run
    assert hashes_of(tmp_path / "merged") == GOLDEN["merged pipeline"]


@pytest.mark.parametrize("shard", [5 * 10**9, 100])
def test_a_merged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    monkeypatch.setattr(checkpoint_writer, "_SHARD", shard)
    (tmp_path / "base").mkdir()
    base = {f"{Q}.weight": counted(4, 6), f"{OUT}.weight": counted(6, 4).to(torch.bfloat16), NORM: counted(6)}
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "lora").mkdir()
    LoraAdapter({Q: low_rank(4, 1, 6)}, all_modules=[Q, OUT], base_model="base").write(tmp_path / "lora")
    adapt_convert.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    (tmp_path / "merged" / "conversion.json").unlink()
    expected = base | {f"{Q}.weight": counted(4, 6) + low_rank(4, 1, 6).dense()}
    found = [load_file(path) for path in sorted((tmp_path / "merged").glob("*.safetensors"))]
    assert len(found) == (1 if shard > 100 else 2)
    merged = {name: value for file in found for name, value in file.items()}
    assert {name: value.dtype for name, value in merged.items()} == {name: value.dtype for name, value in expected.items()}
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert hashes_of(tmp_path / "merged") == GOLDEN["merged checkpoint" if shard > 100 else "merged checkpoint in shards"]
