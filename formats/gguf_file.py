"""GGUF files as bases (extra `gguf`): values by the `gguf` package; names, configuration and the order of rows by transformers' tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from adapt_convert.formats.dequantised import Dequantised, DequantisedFile, even_noise, float_noise
from adapt_convert.formats.errors import AdaptError

if TYPE_CHECKING:
    from adapt_convert.formats.dequantised import Pieces

# Bits of a code, weights that share a scale, and whether the codes lie evenly on both sides of zero.
_GRIDS = {
    "Q4_0": (4, 32, True),
    "Q4_1": (4, 32, False),
    "Q5_0": (5, 32, True),
    "Q5_1": (5, 32, False),
    "Q8_0": (8, 32, True),
    "Q2_K": (2, 16, False),
    "Q3_K": (3, 16, True),
    "Q4_K": (4, 32, False),
    "Q5_K": (5, 32, False),
    "Q6_K": (6, 16, True),
}
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufModel:
    """An opened GGUF: its `config` as a `config.json` would have it, the dequantised tensors, and the types that they are stored in."""

    config: dict[str, Any]
    weights: DequantisedFile
    types: tuple[str, ...]


def open_gguf(path: Path) -> GgufModel:
    """Open a model from its header. Raises `AdaptError` for a damaged file, an adapter, or an architecture without a table."""
    try:
        import transformers
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils
    except ImportError:
        raise AdaptError(f"{path}: is a GGUF file, which takes transformers and gguf to read: pip install 'adapt-convert[gguf]'") from None
    tables, classes = cast(Any, modeling_gguf_pytorch_utils), cast(Any, transformers)
    try:
        reader = GGUFReader(path)
        architecture = (tables.read_field(reader, "general.architecture") or ["of no stated architecture"])[0]
        if tables.read_field(reader, "general.type") == ["adapter"]:
            raise AdaptError(f"{path}: is a GGUF adapter, not a model")
        stated = tables.load_gguf_checkpoint(str(path))["config"]
        config = classes.AutoConfig.for_model(**stated)
        with torch.device("meta"):
            model = classes.AutoModelForCausalLM.from_config(config)
        processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=stated)
        names = tables.get_gguf_hf_weights_map(model, processor)
    except AdaptError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        reason = str(error).partition("\n")[0] or repr(error)
        raise AdaptError(f"{path}: is no GGUF model that transformers can read: {reason}") from None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            continue  # frequencies of the rotary embedding, which the model computes itself
        if len(shapes[name]) > 2:
            raise AdaptError(f"{path}: {tensor.name} holds stacked experts, which are not read from GGUF; use the original checkpoint")
        weights[name] = Dequantised(shapes[name], functools.partial(_pieces, tensor, processor.process, shapes[name], path))
    if not weights:
        raise AdaptError(f"{path}: holds no tensors of a {architecture}")
    types = tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}))
    return GgufModel(config.to_dict() | {"architectures": [type(model).__name__]}, DequantisedFile(path, weights), types)


def _pieces(tensor: Any, process: Callable[..., Any], shape: tuple[int, ...], path: Path) -> Pieces:
    from gguf import dequantize

    try:
        stored = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise AdaptError(f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot dequantise") from None
    value = torch.tensor(process(weights=stored, name=tensor.name).weights, dtype=torch.float32)
    if tuple(value.shape) != shape:
        raise AdaptError(f"{path}: {tensor.name} is {list(value.shape)}, expected {list(shape)}")
    yield value, _noise(torch.from_numpy(stored.copy()).float(), tensor.tensor_type.name)


def _noise(stored: torch.Tensor, kind: str) -> float:
    """From the values alone, as each type keeps its scales in another way: their span over the number of codes is the cell's width."""
    if kind in _HALVES:
        return float_noise(stored.to(_HALVES[kind]), torch.ones(()))
    if kind not in _GRIDS:
        return 0.0
    bits, size, symmetric = _GRIDS[kind]
    groups = stored.reshape(-1, size)
    if symmetric:
        return even_noise(groups.abs().amax(1) / (2 ** (bits - 1) - (bits == 8)), size)
    return even_noise((groups.amax(1) - groups.amin(1)) / (2**bits - 1), size)
