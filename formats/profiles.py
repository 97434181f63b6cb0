"""What each consumer of a LoRA accepts: one entry for each, as data. docs/consumers.md has the same table in words.

A consumer that is handed more either refuses the whole adapter or, worse, runs another model without a word: leaves out what it
does not know, or scales by `alpha / r` where the adapter says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from adapt_convert.formats.errors import AdaptError

PEFT_WEIGHTS = "adapter_model.safetensors"
GGUF_WEIGHTS = "adapter_model.gguf"
IMAGE_FORMS = ("diffusers", "kohya")  # layouts of diffusion models, for each the profile of the same name


@dataclass(frozen=True)
class Profile:
    """The rules of one consumer, as of the release `version` of the software `title`.

    - `layout`: what is written; `weights` the file's name, empty where any `.safetensors` will do, and `keys` an expression that
      every tensor name in it matches.
    - `max_rank`: the largest rank, None without a limit; `ranks` the sizes that its buffers can be set to.
    - `scale`: what it multiplies `B A` by. `modules`: PEFT's own rule, patterns and rsLoRA included; `r`: `alpha / r` of the
      config for every matrix, so ranks have to be uniform; `rank`: `alpha` over the matrix's own rank.
    - `equal_ranks`: every matrix has to be of rank `r`; a smaller one will do otherwise.
    - `rslora`, `dora`, `biases`, `conv1d`: whether it takes them; `reads_bias`: whether it refuses a config that speaks of biases,
      though there are none. `exact`: whether it takes whole tensors (`modules_to_save`).
    - `embedding_types`: the `model_type`s in which it adapts input embeddings and output head, None for all.
    - `companions`: matrices that have to be adapted together in a layer, if any of them is.
    - `every_layer`: a type of matrix is adapted in every layer, or in none.
    - `serve`: how to start it, with `{rank}` for the rank and `{size}` for the smallest of `ranks` that holds it.
    """

    name: str
    title: str
    version: str
    layout: Literal["peft", "gguf", "diffusers", "kohya"]
    weights: str
    keys: str
    max_rank: int | None = None
    ranks: tuple[int, ...] = ()
    scale: Literal["modules", "r", "rank"] = "modules"
    equal_ranks: bool = False
    rslora: bool = False
    dora: bool = False
    biases: bool = False
    reads_bias: bool = False
    conv1d: bool = False
    exact: bool = False
    embedding_types: tuple[str, ...] | None = None
    companions: tuple[tuple[str, ...], ...] = ()
    every_layer: bool = False
    serve: str = ""

    def __post_init__(self) -> None:
        re.compile(self.keys)
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"{self.name}: max_rank {self.max_rank}")
        if list(self.ranks) != sorted(set(self.ranks)) or (self.ranks and self.ranks[-1] != self.max_rank):
            raise ValueError(f"{self.name}: ranks {self.ranks} do not rise to {self.max_rank}")

    @property
    def uniform(self) -> bool:
        """Whether all matrices have to be of one rank."""
        return self.scale != "modules" and self.layout not in IMAGE_FORMS  # where each matrix can have an alpha of its own

    def adapts_embeddings(self, model_type: str) -> bool:
        """Whether it applies a LoRA of the embeddings or the output head in models of this type."""
        return self.embedding_types is None or model_type in self.embedding_types

    def how_to_serve(self, rank: int) -> str:
        """What to start it with for an adapter of this rank; empty where there is nothing to say."""
        size = next((size for size in self.ranks if size >= rank), rank)
        return self.serve.format(rank=rank, size=size)


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_PEFT_KEYS = r"base_model\.model\."
PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "peft",
            "PEFT",
            "0.21",
            "peft",
            PEFT_WEIGHTS,
            _PEFT_KEYS,
            rslora=True,
            dora=True,
            biases=True,
            conv1d=True,
            exact=True,
        ),
        Profile(
            "vllm",
            "vLLM",
            "0.32",
            "peft",
            PEFT_WEIGHTS,
            _PEFT_KEYS,
            max_rank=512,
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),  # MaxLoRARanks in vllm/config/lora.py
            scale="r",  # newer releases read patterns, older ones do not and say nothing
            rslora=True,
            reads_bias=True,
            # The model classes that list `embedding_modules`; others, Qwen among them, refuse (vllm issue 32599).
            embedding_types=("llama", "mistral", "mixtral", "granite"),
            every_layer=True,
            serve="--enable-lora --max-lora-rank {size}",
        ),
        Profile(
            "sglang",
            "SGLang",
            "0.5",
            "peft",
            PEFT_WEIGHTS,
            _PEFT_KEYS,
            scale="r",  # srt/lora/lora.py: scaling = lora_alpha / r
            equal_ranks=True,
            companions=(_QKV, _GATE_UP),  # stacked into one matrix; a missing v_proj is a KeyError
            every_layer=True,
            serve="--enable-lora --max-lora-rank {rank}",
        ),
        Profile(
            "llama.cpp",
            "llama.cpp",
            "b11549",
            "gguf",
            GGUF_WEIGHTS,
            r".*\.lora_[ab]$",
            scale="rank",  # one alpha in the file's header
            conv1d=True,
            serve="--lora adapter_model.gguf",
        ),
        Profile(
            "tensorrt-llm",
            "TensorRT-LLM",
            "1.0",
            "peft",
            PEFT_WEIGHTS,
            _PEFT_KEYS,
            scale="rank",  # lora_manager.py: lora_alpha / effective_rank
            rslora=True,
            embedding_types=(),  # keys of no numbered layer are passed over
            every_layer=True,
            serve="max_lora_rank={rank} in LoraConfig",
        ),
        Profile(
            "diffusers",
            "Diffusers",
            "0.42",
            "diffusers",
            "pytorch_lora_weights.safetensors",
            r"(unet|transformer|text_encoder(_[23])?)\.",
            scale="rank",
        ),
        Profile(
            "kohya",
            "kohya's form",
            "2025",
            "kohya",
            "",
            r"lora_(unet|transformer|te[123]?)_",
            scale="rank",
        ),
    )
}


def profile_named(name: str) -> Profile:
    """The profile of a consumer. Raises `AdaptError` for one that is not listed."""
    if name not in PROFILES:
        raise AdaptError(f"--for {name}: unknown consumer; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
