"""What each consumer of a LoRA accepts: one entry for each, as data. docs/consumers.md has the same table in words.

A consumer that is handed more either refuses the whole adapter or, worse, runs another model without a word: leaves out what it
does not know, or scales by `alpha / r` where the adapter says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from adapt_convert.formats.errors import AdaptError

PEFT_WEIGHTS = "adapter_model.safetensors"
GGUF_WEIGHTS = "adapter_model.gguf"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")  # one matrix of an expert: the stack, its number, its name
ImageForm = Literal["diffusers", "kohya"]  # layouts of diffusion models, for each the profile of the same name
IMAGE_FORMS: tuple[ImageForm, ...] = get_args(ImageForm)


@dataclass(frozen=True)
class Profile:
    """The rules of one consumer, as of the release `version` of the software `title`.

    - `layout`: what is written; `weights` the file's name, empty where any `.safetensors` will do, and `keys` an expression that
      every tensor name in it matches.
    - `max_rank`: the largest rank, None without a limit; `ranks` the sizes that its buffers can be set to.
    - `scale`: what it multiplies `B A` by. `modules`: PEFT's own rule, patterns and rsLoRA included; `r`: `alpha / r` of the
      config for every matrix, so ranks have to be uniform; `rank`: `alpha` over the matrix's own rank. `modules_since` is the
      release from which on it is PEFT's rule, where it was another before.
    - `equal_ranks`: every matrix has to be of rank `r`; a smaller one will do otherwise.
    - `rslora`, `dora`, `biases`, `conv1d`: whether it takes them; `reads_bias`: whether it refuses a config that speaks of biases,
      though there are none. `exact`: whether it takes whole tensors (`modules_to_save`).
    - `modules`: the names of the matrices that it adapts, None where the model decides. `types_without`: the `model_type`s in which
      it adapts nothing.
    - `embedding_types`, `head_types`: the `model_type`s in which it adapts input embeddings, or the output head, None for all;
      `shared_tables`: in these also a table that both share, by a LoRA of each.
    - `needs`: the names that have to be adapted in a layer beside a name, if that is. `experts`: whether any matrix of an expert may
      be adapted by itself; or `kinds` of them, gate and down, somewhere; or `each` of all experts of the layer. `every_layer`: a type
      of matrix is adapted in every layer, or in none.
    - `stacked_types`: the `model_type`s in which it takes the factors of a whole stack of experts (PEFT's `target_parameters`).
    - `refuses`: settings of the config that it refuses; of those that change what an adapter does it runs any other without a word.
      `starts`: the `init_lora_weights` that it takes, None for all. `required`: what the config has to say.
      `lists_targets`: its `target_modules` have to be a list, and no expression.
    - `serve`: how to start it, with `{rank}` for the rank and `{size}` for the smallest of `ranks` that holds it.
    """

    name: str
    title: str
    version: str
    layout: Literal["peft", "gguf"] | ImageForm
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
    modules_since: str = ""
    modules: tuple[str, ...] | None = None
    types_without: tuple[str, ...] = ()
    embedding_types: tuple[str, ...] | None = None
    head_types: tuple[str, ...] | None = None
    shared_tables: bool = False
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Literal["any", "kinds", "each"] = "any"
    every_layer: bool = False
    lists_targets: bool = False
    stacked_types: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    starts: tuple[str, ...] | None = None
    required: tuple[str, ...] = ()
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

    def adapts_table(self, model_type: str, head: bool) -> bool:
        """Whether it applies a LoRA of the embeddings, or of the output head, in models of this type."""
        types = self.head_types if head else self.embedding_types
        return types is None or model_type in types

    def needed_beside(self, module: str) -> list[str]:
        """The modules that have to be adapted in the same layer if `module` is."""
        parent, _, name = module.rpartition(".")
        return [f"{parent}.{other}" for other in self.needs.get(name, ())]

    def how_to_serve(self, rank: int) -> str:
        """What to start it with for an adapter of this rank; empty where there is nothing to say."""
        size = next((size for size in self.ranks if size >= rank), rank)
        return self.serve.format(rank=rank, size=size)


# The classes of vLLM 0.32 that list `lm_head` in `embedding_modules`; Mistral's and Qwen2's are among those that do not.
_VLLM_HEADS = (
    *("apertus", "ernie4_5", "exaone4", "falcon_h1", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hyperclovax"),
    *("jamba", "lfm2", "lfm2_moe", "llama", "llama4_text", "minicpm3", "mixtral", "nemotron", "phi3", "qwen3", "qwen3_moe"),
)
_VLLM_EMBEDDINGS = (  # those that list `embed_tokens` alone, as all that it runs by way of transformers do
    *("arcee", "cohere", "cohere2", "glm", "olmo", "olmo2", "olmo3", "phi", "seed_oss", "smollm3", "starcoder2"),
)
_VLLM_WITHOUT = (  # those without `SupportsLoRA`
    *("bloom", "cohere2_moe", "dbrx", "falcon", "falcon_mamba", "gemma3n_text", "gpt2", "gpt-sw3", "gptj", "hrm_text"),
    *("mamba", "mamba2", "mimo_v2_flash", "stablelm", "zamba2"),
)
_SERVED = ("r", "lora_alpha", "target_modules")
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
            scale="r",
            modules_since="0.32",  # PEFTHelper reads no patterns before, and says nothing
            rslora=True,
            reads_bias=True,
            types_without=_VLLM_WITHOUT,
            embedding_types=(*_VLLM_HEADS, *_VLLM_EMBEDDINGS),
            head_types=_VLLM_HEADS,
            shared_tables=True,
            experts="each",  # vllm/lora/lora_weights.py: pack_moe
            stacked_types=("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe"),  # is_3d_moe_weight
            refuses=("alora_invocation_tokens", "use_bdlora", "use_qalora"),
            starts=("gaussian", "eva", "orthogonal", "mica", "lora_ga"),
            required=_SERVED,
            serve="--enable-lora --max-lora-rank {size}",
        ),
        Profile(
            "sglang",
            "SGLang",
            "0.5",
            "peft",
            PEFT_WEIGHTS,
            _PEFT_KEYS,
            lists_targets=True,
            scale="r",  # srt/lora/lora.py: scaling = lora_alpha / r
            equal_ranks=True,
            modules=(
                *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
                *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "in_proj", "embed_tokens", "lm_head"),
            ),  # srt/lora/utils.py: get_default_hidden_dim knows no other
            # srt/lora/lora.py: stacked into one matrix, for which it makes up zeros for k, and for up
            needs={"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)},
            experts="kinds",  # srt/lora/lora_manager.py: experts are wrapped where gate and down are targets
            every_layer=True,
            required=_SERVED,
            serve="--enable-lora --max-lora-rank {rank} --lora-paths NAME=DIRECTORY",
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
            modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
            embedding_types=(),  # keys of no numbered layer are passed over
            head_types=(),
            every_layer=True,
            required=("r", "lora_alpha"),
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
