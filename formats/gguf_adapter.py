"""LoRA adapters as llama.cpp loads them: one GGUF file, written by the `gguf` package (the extra of that name).

Names are llama.cpp's own, `blk.N.attn_q.weight.lora_a (r, in)` and `.lora_b (out, r)`; the header has one `adapter.lora.alpha` for
all, which llama.cpp divides by each matrix's rank. As `lora_a` of `token_embd` it takes `(vocabulary, r)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.formats.gguf_names import ARCHITECTURES, GgufNames, load_gguf
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.profiles import GGUF_WEIGHTS
from adapt_convert.formats.safetensors_file import LazyTensor


@dataclass(frozen=True)
class GgufAdapter:
    """A LoRA of uniform rank to be written for llama.cpp; `config` is that of the model it is for."""

    lora: LoraAdapter
    config: Mapping[str, Any]
    exact: Mapping[str, Tensor | LazyTensor] = field(default_factory=dict)  # there is no place for whole tensors

    def __post_init__(self) -> None:
        ranks = {delta.rank for delta in (*self.lora.factors.values(), *self.lora.embeddings.values())}
        if len(ranks) != 1 or self.lora.exact or self.lora.biases:
            raise ValueError(f"a GGUF adapter has one rank, no biases and no whole tensors; got ranks {sorted(ranks)}")

    @property
    def rank(self) -> int:
        return next(delta.rank for delta in (*self.lora.factors.values(), *self.lora.embeddings.values()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name in the file, `lora_a` before `lora_b`."""
        names = GgufNames.of(self.config)
        for module, delta in self.lora.factors.items():
            name = names.tensor(module)
            yield f"{name}.lora_a", delta.A
            yield f"{name}.lora_b", self._reordered(str(name), delta.B)
        for module, delta in self.lora.embeddings.items():
            name = names.tensor(module)
            yield f"{name}.lora_a", delta.B  # (vocabulary, r): llama.cpp looks rows up in it
            yield f"{name}.lora_b", delta.A.T

    def _reordered(self, name: str, b: Tensor) -> Tensor:
        """`B (out, r)` with its rows as llama.cpp keeps those of q and k: `(head, half, pair)` becomes `(head, pair, half)`."""
        role = name.split(".")[-2]
        if not ARCHITECTURES[str(self.config["model_type"])][1] or role not in ("attn_q", "attn_k"):
            return b
        heads = int(self.config["num_attention_heads"])
        if role == "attn_k":
            heads = int(self.config.get("num_key_value_heads") or heads)
        return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)

    def write(self, directory: Path) -> int:
        """Write the file; returns its size in bytes."""
        gguf = load_gguf()
        path = directory / GGUF_WEIGHTS
        writer = gguf.GGUFWriter(None, GgufNames.of(self.config).architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(self.rank))
        for name, tensor in self.tensors():
            tensor = tensor.detach().cpu().contiguous()
            if tensor.dtype == torch.bfloat16:  # numpy has no such type: the bytes, and what they are
                writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.stat().st_size
