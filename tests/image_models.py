"""Tiny diffusion pipelines, built by diffusers from their configs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DiffusionPipeline,
        FluxTransformer2DModel,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["UNET", "FluxTransformer2DModel", "UNet2DConditionModel", "image", "load_pipeline", "pipeline_base", "xl_pipeline_base"]
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 12}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 64,  # of both text encoders
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def _tokenizer(directory: Path) -> Any:
    vocabulary = {
        token: number for number, token in enumerate(["a", "b", "c", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"])
    }
    files = directory.parent / "tokenizer-files"
    files.mkdir(exist_ok=True)
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77)


def _clip() -> Any:
    return CLIPTextConfig(**CLIP, max_position_embeddings=77, bos_token_id=6, eos_token_id=7, pad_token_id=7, projection_dim=32)


def pipeline_base(directory: Path, **unet: Any) -> Path:
    """A Stable Diffusion pipeline with random weights, in `directory`; `unet` overrides sizes of its UNet."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET | unet),
        text_encoder=CLIPTextModel(_clip()),
        vae=AutoencoderKL(**VAE),
        tokenizer=_tokenizer(directory),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(directory)
    return directory


def xl_pipeline_base(directory: Path, **unet: Any) -> Path:
    """A Stable Diffusion XL pipeline with random weights, in `directory`; `unet` overrides sizes of its UNet."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**UNET | XL | unet),
        text_encoder=CLIPTextModel(_clip()),
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        vae=AutoencoderKL(**VAE),
        tokenizer=_tokenizer(directory),
        tokenizer_2=_tokenizer(directory),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )
    pipe.save_pretrained(directory)
    return directory


def load_pipeline(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def image(pipe: Any) -> torch.Tensor:
    """What the pipeline paints in two steps from a fixed start, before the VAE: `(1, 4, 8, 8)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(
            "a b c", num_inference_steps=2, height=16, width=16, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images
