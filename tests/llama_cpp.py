"""llama.cpp as an oracle: any tiny model as a GGUF file, and what llama.cpp makes of it, in a process of its own.

A tensor that llama.cpp does not expect may end the whole process, so every run is a subprocess.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

VOCABULARY = 96
PROMPT = [1, 70, 80, 90, 10, 35]
_RUN = """
import json, sys
import xllamacpp

model, adapter = sys.argv[1:3]
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 128, 1, 0, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
request = {"prompt": json.loads(sys.argv[3]), "n_predict": 8, "temperature": 0, "n_probs": int(sys.argv[4]), "ignore_eos": True}
answer = xllamacpp.Server(params).handle_completions(request)
print("ANSWER", json.dumps(answer["choices"][0]["logprobs"]["content"]))
"""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after `PROMPT`, and the log-probabilities of the first, `(VOCABULARY,)` float64."""

    tokens: list[int]
    first: torch.Tensor


def run(model: Path, adapter: Path | str = "") -> Answer:
    """Raises `CalledProcessError` when llama.cpp refuses or dies."""
    command = [sys.executable, "-c", _RUN, str(model), str(adapter), json.dumps(PROMPT), str(VOCABULARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    content = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))[7:])
    assert len(content) == 8, "the server merges tokens that are no whole characters, and their figures are lost"
    first = torch.empty(VOCABULARY, dtype=torch.float64)
    for row in content[0]["top_logprobs"]:
        first[row["id"]] = row["logprob"]
    return Answer([token["id"] for token in content], first)


def write_model(model: Any, path: Path) -> Path:
    """The model as llama.cpp's own converter lays it out, in float32, with a made-up vocabulary."""
    config = model.config
    name = {"mistral": "llama"}.get(config.model_type, config.model_type)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(None, name)
    _write_settings(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, (".weight", ".bias"))
        assert target, key
        writer.add_tensor(target, _as_stored(value.detach().float(), target, config).contiguous().numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_settings(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(VOCABULARY)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(10000.0)
    # Whole words: of a token that ends inside a character the server holds its answer back.
    words = [f"word{number}".encode() for number in range(VOCABULARY - 4)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", b"<0x0A>", *words])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, 6, *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _as_stored(value: torch.Tensor, target: str, config: Any) -> torch.Tensor:
    role = target.split(".")[-2]
    if config.model_type in ("llama", "mistral") and role in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if role == "attn_q" else config.num_key_value_heads
        return torch.cat([head.view(2, -1, value.shape[1]).transpose(0, 1).reshape(head.shape) for head in value.chunk(heads)])
    if config.model_type == "gpt2" and role in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and value.dim() == 2:
        return value.T
    return value + 1 if config.model_type == "gemma" and role.endswith("norm") else value
