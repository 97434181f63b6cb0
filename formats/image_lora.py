"""Writing LoRA files of the image world: one file, in the names of diffusers or of kohya's scripts and ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapt_convert.formats.lora_names import DIFFUSERS_FILE, KOHYA_FILE
from adapt_convert.formats.peft import LoraAdapter, stored_factors
from adapt_convert.formats.profiles import ImageForm
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors


@dataclass
class ImageLora:
    """A LoRA whose factors go into one file; `names` lead from its modules to what they are called there.

    diffusers: `{component}.{module}.lora_A.weight (r, in)`, `lora_B.weight (out, r)`, no alpha, so the scale is 1.
    kohya: `lora_unet_{module}.lora_down.weight`, `lora_up.weight` and a scalar `alpha` equal to the rank, so the scale is 1. Where ranks
    differ there is none, which means the same to all readers: diffusers gives some modules the alpha of others.
    Of a convolution the first is `(r, in, kh, kw)`, the second `(out, r, 1, 1)`.
    """

    lora: LoraAdapter
    names: Mapping[str, str]
    style: ImageForm

    @property
    def exact(self) -> Mapping[str, Tensor | LazyTensor]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The content of the file."""
        halves = ("lora_A", "lora_B") if self.style == "diffusers" else ("lora_down", "lora_up")
        with_alpha = self.style == "kohya" and len({delta.rank for delta in self.lora.factors.values()}) == 1
        tensors: dict[str, Tensor] = {}
        for module, delta in self.lora.factors.items():
            name, (first, second) = self.names[module], stored_factors(delta, self.lora.kernels.get(module))
            tensors[f"{name}.{halves[0]}.weight"] = first
            tensors[f"{name}.{halves[1]}.weight"] = second
            if with_alpha:
                tensors[f"{name}.alpha"] = torch.tensor(float(len(first)), dtype=first.dtype)
        return tensors

    def write(self, directory: Path) -> int:
        """Write the file; returns its size in bytes."""
        return write_safetensors(
            directory / (DIFFUSERS_FILE if self.style == "diffusers" else KOHYA_FILE), self.tensors(), {"format": "pt"}
        )
