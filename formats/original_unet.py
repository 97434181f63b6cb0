"""The UNet of the original Stable Diffusion checkpoints, whose blocks are numbered in one row, in the paths of diffusers' UNet."""

from __future__ import annotations

import re
from collections.abc import Container

UNET = "model.diffusion_model."
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def layers_per_block(keys: Container[str]) -> int:
    """diffusers' `layers_per_block` of the UNet in a checkpoint, by its first downsampler; 2, as in all releases, if it has none."""
    found = (number for number in range(2, 16) if f"{UNET}input_blocks.{number}.0.op.weight" in keys)
    return next(found, 3) - 1


def diffusers_path(module: str, layers: int) -> str | None:
    """The path in diffusers' UNet of a module of the original one, as in `input_blocks.1.0.in_layers.2`; None for one that has none."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", module)
    if match is None:
        return None
    kind, number, rest = match[1], int(match[2]), match[3]
    if kind == "middle_block":
        place = _MIDDLE.get(match[2])
        return _inside(f"mid_block.{place}", rest) if place else None
    part, _, rest = rest.partition(".")
    block, layer = divmod(number - 1 if kind == "input_blocks" else number, layers + 1)
    if kind == "input_blocks" and (part, rest) == ("0", "op"):
        return f"down_blocks.{block}.downsamplers.0.conv"
    if kind == "output_blocks" and part in ("1", "2") and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    if part not in ("0", "1"):
        return None
    side = "down" if kind == "input_blocks" else "up"
    return _inside(f"{side}_blocks.{block}.{'attentions' if part == '1' else 'resnets'}.{layer}", rest)


def _inside(place: str, rest: str) -> str | None:
    """Attention has the same names in both; a resnet has its own."""
    name = rest if ".attentions." in place else _RESNET.get(rest)
    return f"{place}.{name}" if name else None
