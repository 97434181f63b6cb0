"""Original single files of Stable Diffusion 1 and XL: what is mapped is what diffusers maps, and what is written runs there.

The files are written from diffusers' own models, by the inverse of diffusers' mapping; that it is the inverse is tested first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint
from image_models import image, load_pipeline, pipeline_base, xl_pipeline_base
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.diffusion import layout_of, located
from adapt_convert.formats.location import locate

UNET = "model.diffusion_model."
CLIP = {"SD 1": "cond_stage_model.transformer.text_model.", "SDXL": "conditioner.embedders.0.transformer.text_model."}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(module: str, layers: int, has_attention: Any) -> str:
    """What the original UNet calls a module of diffusers'; `has_attention(block)` says whether an up block has any."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    side, block, kind, number, *rest = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", module).groups()
    layer, tail = int(number), rest[0]
    if side is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{RESNET.get(tail, tail)}"
    start = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if has_attention(int(block)) else 1}.conv"
    row = f"input_blocks.{start + layer + 1}" if side == "down" else f"output_blocks.{start + layer}"
    return f"{row}.1.{tail}" if kind == "attentions" else f"{row}.0.{RESNET[tail]}"


def single_file(pipe: Any, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline's UNet and first text encoder, and one of its VAE, as an original file has them."""
    unet, text = pipe.unet.state_dict(), pipe.text_encoder.state_dict()

    def has_attention(block: int) -> bool:
        return any(name.startswith(f"up_blocks.{block}.attentions.") for name in unet)

    layers, tensors = pipe.unet.config.layers_per_block, {}
    for name, value in unet.items():
        module, _, parameter = name.rpartition(".")
        tensors[f"{UNET}{original_name(module, layers, has_attention)}.{parameter}"] = value
    tensors |= {CLIP[kind] + name.removeprefix("text_model."): value for name, value in text.items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = pipe.vae.decoder.conv_in.weight.data
    if kind == "SDXL":
        layer = pipe.text_encoder_2.state_dict()
        start = next(name for name in layer if name.endswith("layers.0.self_attn.q_proj.weight")).removesuffix("q_proj.weight")
        fused = torch.cat([layer[f"{start}{part}_proj.weight"] for part in "qkv"])
        tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] = fused
    return {name: value.contiguous() for name, value in tensors.items()}


@dataclass(frozen=True)
class Files:
    """Base and fine-tune, each as a pipeline and as a single file."""

    base: Path
    ft: Path
    base_file: Path
    ft_file: Path
    unet: Any


@pytest.fixture(scope="module", params=CLIP)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Files]:
    kind, directory = request.param, tmp_path_factory.mktemp("single")
    base = (pipeline_base if kind == "SD 1" else xl_pipeline_base)(directory / "base", layers_per_block=2)
    pipe = load_pipeline(base)
    save_file(single_file(pipe, kind), directory / "base.safetensors")
    torch.manual_seed(1)
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding.weight" not in name:
                parameter.data += 0.03 * torch.randn_like(parameter)
    pipe.save_pretrained(directory / "ft")
    save_file(single_file(pipe, kind), directory / "ft.safetensors")
    return kind, Files(base, directory / "ft", directory / "base.safetensors", directory / "ft.safetensors", pipe.unet)


def test_the_files_are_what_diffusers_reads(files: tuple[str, Files]) -> None:
    kind, made = files
    state, expected = load_file(made.ft_file), made.unet.state_dict()
    theirs = convert_ldm_unet_checkpoint(dict(state), made.unet.config)
    assert set(theirs) == set(expected)
    assert all(torch.equal(theirs[name], value) for name, value in expected.items())
    text = {name.removeprefix("text_model."): value for name, value in load_pipeline(made.ft).text_encoder.state_dict().items()}
    theirs = convert_ldm_clip_checkpoint({name: value for name, value in state.items() if name.startswith(CLIP[kind])})
    assert {name.removeprefix("text_model.") for name in theirs} == set(text)
    assert all(torch.equal(theirs[f"text_model.{name}"], value) for name, value in text.items())


def test_every_module_is_mapped_as_diffusers_maps_it(files: tuple[str, Files]) -> None:
    """diffusers' function over a checkpoint whose values are its own names, against the paths that we look names up by."""
    kind, made = files
    base = Checkpoint(locate(made.base_file))
    theirs = convert_ldm_unet_checkpoint({name: name for name in base.infos}, made.unet.config)
    assert len(theirs) == sum(name.startswith(UNET) for name in base.infos)
    for mapped, name in theirs.items():
        module = located(name.rpartition(".")[0], base, layout_of(base))
        assert module.component == "unet"
        assert mapped.rpartition(".")[0] == (module.inside if kind == "SD 1" else module.other)


def test_a_lora_of_two_files_paints_what_the_fine_tune_paints(files: tuple[str, Files], tmp_path: Path) -> None:
    kind, made = files
    conversion = adapt_convert.convert(made.base_file, made.ft_file, rank=1000)
    changed = {name: row["status"] for name, row in conversion.report["tensors"].items() if row["energy"]}
    assert set(changed.values()) == {"factored"}
    assert len(changed) == sum(not torch.equal(value, load_file(made.base_file)[name]) for name, value in load_file(made.ft_file).items())
    out = conversion.save(tmp_path / "lora")
    start = "lora_unet_down_blocks_0_" if kind == "SD 1" else "lora_unet_input_blocks_1_"
    assert any(name.startswith(start) for name in load_file(out / "lora.safetensors"))
    expected, before = image(load_pipeline(made.ft)), image(load_pipeline(made.base))
    assert (expected - before).abs().max() > 0.5
    pipe = load_pipeline(made.base)
    pipe.load_lora_weights(out, weight_name="lora.safetensors")
    torch.testing.assert_close(image(pipe), expected, atol=1e-3, rtol=1e-3)

    adapt_convert.merge(made.base_file, out / "lora.safetensors", tmp_path / "merged")
    merged, ft = load_file(tmp_path / "merged" / "model.safetensors"), load_file(made.ft_file)
    assert merged.keys() == ft.keys()
    for name, value in ft.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


def test_a_lora_of_pipelines_is_of_the_single_file_too(files: tuple[str, Files], tmp_path: Path) -> None:
    """kohya's names, from diffusers' model paths, adapt the same tensors of the original file, in SDXL's too."""
    _, made = files
    lora = adapt_convert.convert(made.base, made.ft, rank=1000, profile="kohya").save(tmp_path / "lora")
    adapt_convert.merge(made.base_file, lora / "lora.safetensors", tmp_path / "merged")
    merged, ft = load_file(tmp_path / "merged" / "model.safetensors"), load_file(made.ft_file)
    for name, value in ft.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


def test_open_clip_is_named_as_lost(files: tuple[str, Files], tmp_path: Path) -> None:
    kind, made = files
    if kind == "SD 1":
        pytest.skip("has no OpenCLIP")
    state = load_file(made.ft_file)
    fused = next(name for name in state if name.endswith("in_proj_weight"))
    save_file(state | {fused: 1.01 * state[fused]}, tmp_path / "ft.safetensors")
    row = adapt_convert.convert(made.base_file, tmp_path / "ft.safetensors", rank=2).report["tensors"][fused]
    assert row["status"] == "dropped"
    assert row["energy"]
