"""Quantised bases: read as the library that owns the format reads them, and the noise beneath a change said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import Pair, save_pair
from families import tiny
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.opening import open_base
from adapt_convert.formats.dequantised import Dequantised, DequantisedFile

State = dict[str, torch.Tensor]
BLOCK = [16, 16]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("quantised"), *tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128))


def quantised_copy(pair: Pair, directory: Path, quantise: Any, config: dict[str, Any]) -> tuple[Path, State]:
    """The base with every matrix of its layers as `quantise(module, weight)` stores it; and what the format's owner reads of them."""
    state, expected = {}, {}
    for name, value in load_file(pair.base / "model.safetensors").items():
        if value.ndim == 2 and ".layers." in name:
            stored, expected[name] = quantise(name.removesuffix(".weight"), value)
            state |= stored
        else:
            state[name] = value
    directory.mkdir()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((pair.base / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(written))
    return directory, expected


def fp8_blocks(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    quantiser = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=BLOCK, scale_fmt="float"))
    stored = Fp8Quantize(quantiser).convert({f"{module}.weight": weight})
    codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale_inv"]
    return stored, _dequantize_fp8_weight(codes, scale, BLOCK, torch.float32)


def fp8_rows(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.ones(1)}, codes.float() * scale


def fp8_whole(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    scale = weight.abs().amax() / 57344
    codes = (weight / scale).to(torch.float8_e5m2)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}, _dequantize_fp8_weight(codes, scale, None, torch.float32)


def four_bits(kind: str, nested: bool) -> Any:
    def quantise(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=kind, compress_statistics=nested)
        layer.load_state_dict({"weight": weight})
        layer.to("cpu")
        stored = {f"{module}.{name}": value for name, value in layer.state_dict().items()}
        return stored, layer(torch.eye(weight.shape[1])).T.detach().contiguous()

    return quantise


def eight_bits(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    layer = Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer.to("cpu")
    stored = {f"{module}.{name}": value for name, value in layer.state_dict().items()}
    return stored, stored[f"{module}.weight"].float() * stored[f"{module}.SCB"][:, None] / 127


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8 blocks": (fp8_blocks, {"quantization_config": {"quant_method": "fp8", "weight_block_size": BLOCK}}),
    "fp8 rows": (fp8_rows, {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}),
    "fp8 whole": (fp8_whole, {}),
    "nf4": (four_bits("nf4", nested=False), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    "nf4 nested": (four_bits("nf4", nested=True), {}),
    "fp4": (four_bits("fp4", nested=False), {}),
    "int8": (eight_bits, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_is_read_as_its_own_library_reads_it(pair: Pair, tmp_path: Path, name: str) -> None:
    directory, expected = quantised_copy(pair, tmp_path / "base", *FORMATS[name])
    base = open_base(directory)
    original = load_file(pair.base / "model.safetensors")
    assert set(base.infos) == set(original)
    for key, value in original.items():
        found = base.read(key)
        torch.testing.assert_close(found, expected.get(key, value), atol=1e-6, rtol=1e-5)
        assert torch.equal(torch.cat([block.clone() for block in base.blocks(key, 100)]).view(value.shape), found)
    true = sum(float((base.read(key) - original[key]).square().sum()) for key in expected)
    assert sum(base.store.noise[key] for key in expected) == pytest.approx(true, rel=0.25)


@pytest.mark.parametrize("name", ["fp8 blocks", "nf4 nested", "int8"])
def test_full_rank_leads_from_the_quantised_base_to_the_fine_tune(pair: Pair, tmp_path: Path, name: str) -> None:
    """The adapter on what the base computes with is the fine-tune; how much of it undoes rounding is said."""
    directory, expected = quantised_copy(pair, tmp_path / "base", *FORMATS[name])
    out = adapt_convert.convert(directory, pair.ft, rank=64, strict=True).save(tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(load_file(pair.base / "model.safetensors") | expected, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_bytes((pair.base / "config.json").read_bytes())
    on_plain = Pair(plain, pair.ft, pair.model_class, pair.inputs)
    torch.testing.assert_close(on_plain.logits(on_plain.load_peft(out)), pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=2e-4)
    adapt_convert.merge(directory, out, tmp_path / "merged")  # an ordinary checkpoint
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=2e-4)
    report = json.loads((out / "conversion.json").read_text())
    rows = [row for row in report["tensors"].values() if row["status"] == "factored"]
    noisy = [row["base_noise"] for row in rows if "base_noise" in row]
    assert len(noisy) == 7  # the head is not quantised
    assert report["quantised_base"]["noise"] == pytest.approx(sum(noisy) / sum(row["energy"] for row in rows))
    assert 0 < report["quantised_base"]["noise"] < 1
    assert any("what its rounding took away" in note for note in adapt_convert.inspect(directory, pair.ft)["notes"])


def test_rows_shorter_than_a_block_of_bitsandbytes(tmp_path: Path) -> None:
    """Its own dequantisation on a CPU takes wrong scales there, at eight times the error that four bits leave."""
    narrow = save_pair(tmp_path / "narrow", *tiny("llama", num_hidden_layers=1))
    directory, expected = quantised_copy(narrow, tmp_path / "base", *FORMATS["nf4 nested"])
    base, original = open_base(directory), load_file(narrow.base / "model.safetensors")
    error = sum(float((base.read(key) - original[key]).square().sum()) for key in expected)
    assert error < 0.012 * sum(float(original[key].square().sum()) for key in expected)


def test_mxfp4_experts(tmp_path: Path) -> None:
    """As gpt-oss is published: the stacks packed, all else in bfloat16; transformers' own unpacking is the oracle."""
    model_class, config = tiny("gpt_oss", hidden_size=64, intermediate_size=32)
    pair = save_pair(tmp_path / "pair", model_class, config)
    state, generator = load_file(pair.base / "model.safetensors"), torch.Generator().manual_seed(0)
    plain, packed = dict(state), dict(state)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = state[name].shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    written = json.loads((pair.base / "config.json").read_text())
    for directory, tensors, more in (
        (tmp_path / "q", packed, {"quantization_config": {"quant_method": "mxfp4"}}),
        (tmp_path / "p", plain, {}),
    ):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(written | more))
    quantised, expected = open_base(tmp_path / "q"), open_base(tmp_path / "p")
    assert set(quantised.infos) == set(expected.infos)
    for name in expected.infos:
        torch.testing.assert_close(quantised.read(name), expected.read(name), atol=0, rtol=0)
    experts = [name for name in expected.infos if ".experts." in name and "bias" not in name]
    assert all(quantised.store.noise[name] > 0 for name in experts)
    reports = [adapt_convert.convert(tmp_path / name, pair.ft, rank=2).report for name in "qp"]
    assert reports[0]["captured_energy"] == reports[1]["captured_energy"]


def write_gguf(path: Path, model: Any, architecture: str, kind: gguf.GGMLQuantizationType, quantise: Any = None) -> None:
    """As llama.cpp's converter would: its own names, and for a Llama the rows of q and k in the order of its rotation."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), config.num_hidden_layers)
    for name, value in model.state_dict().items():
        rows = value.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            rows = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        matrix = rows.ndim == 2
        stored = (quantise(rows) if quantise else gguf.quants.quantize(rows, kind)) if matrix else rows
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GRIDS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize(("architecture", "kind"), [*(("llama", kind) for kind in GRIDS), ("qwen2", "Q8_0")])
def test_a_gguf_base_is_read_as_transformers_reads_it(tmp_path: Path, architecture: str, kind: str) -> None:
    model_class, config = tiny(architecture, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    write_gguf(tmp_path / "model.gguf", model, architecture, gguf.GGMLQuantizationType[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    base = open_base(tmp_path / "model.gguf")
    assert set(base.infos) == set(expected)
    assert base.config["model_type"] == architecture
    true = estimated = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(base.read(name), value, atol=0, rtol=0)
        if value.ndim == 2:
            true += float((value - model.state_dict()[name]).square().sum())
            estimated += base.store.noise[name]
    assert estimated == pytest.approx(true, rel=0.3)


@pytest.mark.parametrize(("kind", "size", "scales"), [("Q4_K", 144, (0, 2)), ("Q5_K", 176, (0, 2)), ("Q6_K", 210, (208,))])
def test_k_quants_are_read_as_transformers_reads_them(tmp_path: Path, kind: str, size: int, scales: tuple[int, ...]) -> None:
    """Blocks of 256 weights from random codes, as the package writes none; with scales of an ordinary size."""
    model_class, config = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    model, generator = model_class(config), numpy.random.default_rng(0)

    def random_blocks(rows: numpy.ndarray) -> numpy.ndarray:
        blocks = generator.integers(0, 256, (rows.size // 256, size), dtype=numpy.uint8)
        for place in scales:
            blocks[:, place : place + 2] = numpy.full((len(blocks), 1), 0.001, numpy.float16).view(numpy.uint8)
        return blocks.reshape(len(rows), -1)

    write_gguf(tmp_path / "model.gguf", model, "llama", gguf.GGMLQuantizationType[kind], random_blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    base = open_base(tmp_path / "model.gguf")
    for name, value in expected.items():
        torch.testing.assert_close(base.read(name), value, atol=0, rtol=0)
        assert (base.store.noise[name] > 0) == (value.ndim == 2)


def test_a_fine_tune_of_a_gguf_base(tmp_path: Path) -> None:
    model_class, config = tiny("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, tie_word_embeddings=False)
    pair = save_pair(tmp_path, model_class, config)
    write_gguf(tmp_path / "q8.gguf", pair.load(pair.base), "llama", gguf.GGMLQuantizationType.Q8_0)
    out = adapt_convert.convert(tmp_path / "q8.gguf", pair.ft, rank=96, strict=True).save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q8.gguf", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, out).eval()
    torch.testing.assert_close(pair.logits(adapted), pair.logits(pair.load(pair.ft)), atol=1e-3, rtol=1e-3)
    adapt_convert.merge(tmp_path / "q8.gguf", out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(pair.load(pair.ft)), atol=1e-3, rtol=1e-3)
    assert json.loads((out / "conversion.json").read_text())["quantised_base"]["format"] == "GGUF, Q8_0"


def test_what_cannot_be_dequantised_is_refused_by_name(pair: Pair, tmp_path: Path) -> None:
    def packed(module: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        return {f"{module}.qweight": torch.zeros(4, 4, dtype=torch.int32), f"{module}.qzeros": torch.zeros(1)}, weight

    directory, _ = quantised_copy(pair, tmp_path / "gptq", packed, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(AdaptError, match=r"is quantised \(gptq; .*use the unquantised original"):
        adapt_convert.convert(directory, pair.ft, rank=2)
    fp8, _ = quantised_copy(pair, tmp_path / "fp8", *FORMATS["fp8 rows"])
    with pytest.raises(AdaptError, match=r"is quantised \(compressed-tensors; "):
        adapt_convert.convert(pair.base, fp8, rank=2)  # as a fine-tune
    state = load_file(fp8 / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight_scale"
    save_file(state | {key: torch.ones(5)}, fp8 / "model.safetensors")
    with pytest.raises(AdaptError, match=r"up_proj.weight_scale is \[5\], which fits neither rows nor blocks"):
        adapt_convert.convert(fp8, pair.ft, rank=2)
    del state[key]
    save_file(state, fp8 / "model.safetensors")
    with pytest.raises(AdaptError, match=r"quantised \(F8_E4M3; model\.layers\.0\.mlp\.up_proj\.weight\) without the weight_scale"):
        adapt_convert.convert(fp8, pair.ft, rank=2)


def test_a_damaged_gguf_is_refused_in_one_line(pair: Pair, tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, numpy.random.default_rng(0).bytes(300)):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(AdaptError, match=r"broken\.gguf: is no GGUF model that transformers can read"):
            adapt_convert.convert(tmp_path / "broken.gguf", pair.ft, rank=2)


def test_blocks_are_of_one_size_whatever_the_pieces() -> None:
    value = torch.arange(23.0)
    file = DequantisedFile(Path("x"), {"w": Dequantised((23,), lambda: iter((piece, 1.0) for piece in value.split([2, 9, 5, 7])))})
    assert [len(block) for block in file.blocks("w", 5)] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(list(file.blocks("w", 5))), value)
    assert file.noise["w"] == 4.0
