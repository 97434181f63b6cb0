"""Writing a checkpoint directory that transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_convert.formats.checkpoint import PIPELINE
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors

DIFFUSERS_STEM = "diffusion_pytorch_model"

_SHARD = 5 * 10**9  # bytes, as transformers shards
_COPIED = re.compile(
    r"^(config|generation_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$"
    r"|^(merges|vocab)\.txt$|\.model$|\.jinja$|^LICENSE"
)


def write_checkpoint(directory: Path, tensors: Mapping[str, LazyTensor], stem: str = "model") -> tuple[int, int]:
    """Write the weights as transformers does, in one file or in shards with an index, one tensor in memory at a time.

    `stem` begins the names of files: `model`, or diffusers' `diffusion_pytorch_model`. Returns the bytes and the number of files.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > _SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return write_safetensors(directory / f"{stem}.safetensors", shards[0], {"format": "pt"}), 1
    size = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        size += write_safetensors(directory / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return size, len(shards)


def write_pipeline(base: Path, directory: Path, tensors: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """Write a diffusers pipeline: every component of `base` in a directory of its own, the weights from `tensors`, whose names begin with
    the component's. Returns the bytes and the number of files of weights."""
    index = json.loads((base / PIPELINE).read_text(encoding="utf-8"))
    shutil.copyfile(base / PIPELINE, directory / PIPELINE)
    size = files = 0
    for component in sorted(name for name in index if not name.startswith(("_", ".")) and (base / name).is_dir()):
        (directory / component).mkdir()
        for path in (base / component).iterdir():
            if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / component / path.name)
        held = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items() if name.startswith(f"{component}.")}
        if held:
            stem = "model" if index[component][0] == "transformers" else DIFFUSERS_STEM
            written = write_checkpoint(directory / component, held, stem)
            size, files = size + written[0], files + written[1]
    return size, files


def copy_small_files(
    source: Path,
    target: Path,
    untie: bool,
    dtype: str | None = None,
    dequantised: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
) -> None:
    """Copy configuration, tokenizer and licence; `untie` tells the configuration that the head has its own weight, `dtype` in what
    the weights are stored, without which transformers would load them in the base's. `dequantised` is the configuration of a quantised
    source, of which the weights are float32 now; `vocabulary` the number of tokens after some were added."""
    for path in source.iterdir():
        if path.is_file() and _COPIED.search(path.name):
            shutil.copyfile(path, target / path.name)
    config = target / "config.json"
    if dequantised is not None:
        plain = {key: value for key, value in dequantised.items() if key != "quantization_config"}
        config.write_text(json.dumps(plain, indent=2) + "\n")
        dtype = dtype or "float32"
    changes: dict[str, object] = {"tie_word_embeddings": False} if untie else {}
    changes |= {"vocab_size": vocabulary} if vocabulary else {}
    if config.is_file() and (changes or dtype):
        data = json.loads(config.read_text())
        changes |= {key: dtype for key in ("dtype", "torch_dtype") if key in data} or {"dtype": dtype} if dtype else {}
        config.write_text(json.dumps(data | changes, indent=2) + "\n")
