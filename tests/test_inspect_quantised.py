"""`inspect` of a quantised model alone: its format, size and fate, from headers and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import Pair, save_pair
from families import tiny
from safetensors.torch import load_file, save_file
from test_quantised import FORMATS, State, quantised_copy, write_gguf

import adapt_convert
from adapt_convert import AdaptError, inspect
from adapt_convert.cli import main
from adapt_convert.formats.gguf_header import TYPES, read_gguf_header

GROUP = 32


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("original"), *tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128))


def gptq(bits: int) -> Any:
    """The shapes in which AutoGPTQ and its successors store a matrix `(out, in)`: packed along `in`."""

    def quantise(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        out, inside = weight.shape
        shapes = {"qweight": (inside * bits // 32, out), "qzeros": (inside // GROUP, out * bits // 32), "g_idx": (inside,)}
        stored = {f"{module}.{name}": torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        return stored | {f"{module}.scales": torch.ones(inside // GROUP, out, dtype=torch.float16)}, weight

    return quantise


def awq(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Those of AutoAWQ: packed along `out`."""
    out, inside = weight.shape
    stored = {f"{module}.{name}": torch.zeros(rows, out // 8, dtype=torch.int32) for name, rows in (("qweight", inside), ("qzeros", 2))}
    return stored | {f"{module}.scales": torch.ones(2, out, dtype=torch.float16)}, weight


def packed(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """compressed-tensors' `pack-quantized`."""
    out, inside = weight.shape
    stored = {"weight_packed": torch.zeros(out, inside // 8, dtype=torch.int32), "weight_shape": torch.tensor([out, inside])}
    stored["weight_scale"] = torch.ones(out, 2)
    return {f"{module}.{name}": value for name, value in stored.items()}, weight


_GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
REFUSED: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "GPTQ, 4 bits": (gptq(4), {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP}}, "GPTQ", 4),
    "GPTQ, 8 bits": (gptq(8), {"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ", 8),
    "GPTQ, 3 bits, unnamed": (gptq(3), {}, "GPTQ", 3),
    "AWQ": (awq, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ", 4),
    "AWQ, unnamed": (awq, {}, "AWQ", 4),
    "compressed-tensors": (packed, {"quantization_config": {"quant_method": "compressed-tensors", **_GROUPS}}, "compressed-tensors", 4),
}
READ = {  # by FORMATS' names
    "fp8 blocks": ("FP8", 8, {"F8_E4M3", "F32"}),
    "fp8 rows": ("compressed-tensors", 8, {"F8_E4M3", "F32"}),
    "fp8 whole": ("FP8", 8, {"F8_E5M2", "F32"}),
    "nf4": ("bitsandbytes", 4, {"U8", "F32"}),
    "nf4 nested": ("bitsandbytes", 4, {"U8", "F32"}),
    "int8": ("bitsandbytes", 8, {"I8", "F32", "U8"}),
}


def numbers(pair: Pair) -> int:
    return int(pair.load(pair.base).num_parameters())


@pytest.mark.parametrize("name", READ)
def test_what_can_be_a_base(pair: Pair, tmp_path: Path, name: str) -> None:
    directory, _ = quantised_copy(pair, tmp_path / "q", *FORMATS[name])
    method, bits, dtypes = READ[name]
    found = inspect(directory)
    assert (found["quantisation"], found["bits"], found["parameters"]) == (method, bits, numbers(pair))
    assert (found["kind"], found["model_type"], found["layers"]) == ("checkpoint", "llama", 1)
    assert found["as_base"].startswith("dequantised")
    assert set(found["dtypes"]) == dtypes
    assert found["tensors"] == len(load_file(directory / "model.safetensors"))
    assert adapt_convert.convert(directory, pair.ft, rank=2).report["captured_energy"] > 0  # as it says


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot(pair: Pair, tmp_path: Path, name: str) -> None:
    quantise, config, method, bits = REFUSED[name]
    directory, _ = quantised_copy(pair, tmp_path / "q", quantise, config)
    found = inspect(directory)
    assert (found["quantisation"], found["bits"], found["parameters"]) == (method, bits, numbers(pair))
    assert found["layers"] == 1
    with pytest.raises(AdaptError) as error:
        adapt_convert.convert(directory, pair.ft, rank=2)
    assert found["as_base"] == f"refused: {error.value}"
    assert "in codes that only its own library unpacks; use the unquantised original, or dequantise it first" in found["as_base"]


def test_unknown_widths_are_not_guessed(pair: Pair, tmp_path: Path) -> None:
    directory, _ = quantised_copy(pair, tmp_path / "q", packed, {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert (inspect(directory)["bits"], inspect(directory)["parameters"]) == (None, None)


def test_mxfp4(tmp_path: Path) -> None:
    model_class, config = tiny("gpt_oss", hidden_size=64, intermediate_size=32)
    model = model_class(config)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.zeros(count, rows, columns // 32, 16, dtype=torch.uint8)
        state[f"{name}_scales"] = torch.zeros(count, rows, columns // 32, dtype=torch.uint8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    found = inspect(tmp_path)
    expected = ("MXFP4", 4, model.num_parameters(), "dequantised as it is read")
    assert (found["quantisation"], found["bits"], found["parameters"], found["as_base"]) == expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_gguf(pair: Pair, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, pair.load(pair.base), "llama", gguf.GGMLQuantizationType[kind])
    theirs = gguf.GGUFReader(path).tensors
    for place in (path, tmp_path):
        found = inspect(place)
        assert (found["quantisation"], found["model_type"], found["layers"]) == ("GGUF", "llama", 1)
        assert (found["tensors"], found["parameters"]) == (len(theirs), sum(int(tensor.n_elements) for tensor in theirs))
        assert set(found["dtypes"]) == {tensor.tensor_type.name for tensor in theirs} == {kind, "F32"}
        assert found["bytes"] == path.stat().st_size


def test_types_are_named_as_ggml_names_them() -> None:
    assert {number: gguf.GGMLQuantizationType(number).name for number in TYPES} == TYPES


def test_a_vocabulary_is_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list([b"\xff\xfe", b"", *(f"token {number}" for number in range(1000))])  # a piece of a character, as models have
    writer.add_tensor("output.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "model.gguf")
    assert (header.layers, header.shapes, header.types) == (3, {"output.weight": (2, 32)}, {"output.weight": "F32"})


def test_a_damaged_gguf_model_is_refused_in_one_line(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, pair.load(pair.base), "llama", gguf.GGMLQuantizationType.Q8_0)
    content = path.read_bytes()
    for damaged in (b"", content[:90], content[:8] + b"\xff" * 16 + content[24:]):
        path.write_bytes(damaged)
        done = CliRunner().invoke(main, ["inspect", str(path)])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"Error: {path}: is damaged or not a GGUF file")


def test_a_vocabulary_of_impossible_sizes_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("output_norm.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content, key = path.read_bytes(), b"tokenizer.ggml.tokens"
    size = content.index(key) + len(key) + 4 + 4 + 8  # behind the kinds and the number of texts
    assert content[size : size + 9] == (1).to_bytes(8, "little") + b"a"
    path.write_bytes(content[:size] + b"\xff" * 8 + content[size + 8 :])
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)


def test_nothing_heavy_is_loaded(pair: Pair, tmp_path: Path) -> None:
    places = [quantised_copy(pair, tmp_path / str(n), *FORMATS[name])[0] for n, name in enumerate(("fp8 blocks", "nf4 nested", "int8"))]
    places += [quantised_copy(pair, tmp_path / name, *REFUSED[name][:2])[0] for name in ("GPTQ, 4 bits", "AWQ")]
    write_gguf(tmp_path / "model.gguf", pair.load(pair.base), "llama", gguf.GGMLQuantizationType.Q8_0)
    code = (
        "import json, sys, adapt_convert; found = [adapt_convert.inspect(path) for path in sys.argv[1:]];"
        "heavy = sorted({'torch', 'transformers', 'peft', 'bitsandbytes', 'gguf'} & set(sys.modules));"
        "print(json.dumps([heavy, [each['quantisation'] for each in found]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *places, tmp_path / "model.gguf"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], ["FP8", "bitsandbytes", "bitsandbytes", "GPTQ", "AWQ", "GGUF"]]
