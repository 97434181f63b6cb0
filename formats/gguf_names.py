"""llama.cpp's names of a model's tensors, by the table of the `gguf` package (the extra of that name); needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapt_convert.formats.errors import AdaptError

# `model_type` -> llama.cpp's architecture, and whether it keeps the rows of q and k in its own order: rotary pairs side by
# side, where transformers has all first and then all second halves.
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gpt2": ("gpt2", False),
}


def load_gguf() -> Any:
    """The `gguf` package. Raises `AdaptError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise AdaptError("GGUF files need the extra `gguf`: pip install 'adapt-convert[gguf]'") from None
    return gguf


@dataclass(frozen=True)
class GgufNames:
    """llama.cpp's names of a model's tensors, by the `gguf` package's own table."""

    architecture: str
    map: Any

    @staticmethod
    def of(config: Mapping[str, Any]) -> GgufNames:
        """Raises `AdaptError` for a model type that is not listed here, or without a number of layers."""
        gguf = load_gguf()
        model_type = str(config.get("model_type"))
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        if model_type not in ARCHITECTURES or type(layers) is not int or not 0 < layers < 10_000:
            raise AdaptError(
                f"--for llama.cpp: a {model_type} is not among {', '.join(ARCHITECTURES)}; write a PEFT LoRA and give it to llama.cpp's "
                "convert_lora_to_gguf.py"
            )
        architecture = ARCHITECTURES[model_type][0]
        key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        return GgufNames(architecture, gguf.get_tensor_name_map(key, layers))

    def tensor(self, module: str) -> str | None:
        """The tensor of a module's weight, or None where llama.cpp has none."""
        name = self.map.get_name(f"{module}.weight", try_suffixes=(".weight",))
        return name if isinstance(name, str) else None
