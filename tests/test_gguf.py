"""GGUF adapters, run by llama.cpp itself beside the merged model's GGUF file and beside transformers."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

from adapt_convert import AdaptError, convert, inspect, lint, merge
from adapt_convert.cli import main
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.gguf_adapter import GgufAdapter
from adapt_convert.formats.gguf_header import read_gguf_header
from adapt_convert.formats.gguf_names import ARCHITECTURES
from adapt_convert.formats.peft import LoraAdapter

pytest.importorskip("xllamacpp")
import llama_cpp
from llama_cpp import PROMPT, VOCABULARY, write_model
from mutations import cut, flip

_SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128},
}
_UNTIED = {"tie_word_embeddings": False}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**_SIZES, **_UNTIED, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**_SIZES, **_UNTIED, num_key_value_heads=2, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**_SIZES, **_UNTIED, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**_SIZES, **_UNTIED, num_key_value_heads=2, head_dim=16),
    "gemma": transformers.GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=16),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
}


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_diff_dict(), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_both(directory: Path, model: Any, changed: Any = lambda name, value: value.dim() == 2 and "embed" not in name) -> None:
    """`base` and `ft`, each as a checkpoint and as a GGUF file; those parameters differ of which `changed` says so."""
    model.save_pretrained(directory / "base")
    write_model(model, directory / "base.gguf")
    for name, parameter in model.named_parameters():
        if changed(name, parameter) and "wte" not in name and "wpe" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory / "ft")
    write_model(model, directory / "ft.gguf")


def logarithms(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)


def test_every_listed_architecture_is_run() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_runs_the_adapter_as_the_merged_model(name: str, tmp_path: Path) -> None:
    save_both(tmp_path, model_of(name))
    convert(tmp_path / "base", tmp_path / "ft", profile="llama.cpp", rank=64).save(tmp_path / "out")
    base, ft = llama_cpp.run(tmp_path / "base.gguf"), llama_cpp.run(tmp_path / "ft.gguf")
    adapted = llama_cpp.run(tmp_path / "base.gguf", tmp_path / "out" / "adapter_model.gguf")
    torch.testing.assert_close(ft.first, logarithms(tmp_path / "ft"), atol=1e-3, rtol=0)  # the GGUF file is the model
    assert (base.first - ft.first).abs().max() > 0.1
    torch.testing.assert_close(adapted.first, ft.first, atol=2e-4, rtol=0)
    assert adapted.tokens == ft.tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """Rounding aside, the adapter that llama.cpp runs is the one that was written: that of the same dtype in PEFT."""
    save_both(tmp_path, model_of("llama"))
    convert(tmp_path / "base", tmp_path / "ft", profile="llama.cpp", rank=4, dtype=dtype).save(tmp_path / "out")
    convert(tmp_path / "base", tmp_path / "ft", profile="peft", rank=4, dtype=dtype).save(tmp_path / "peft")
    adapted = llama_cpp.run(tmp_path / "base.gguf", tmp_path / "out" / "adapter_model.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)
    assert (adapted.first - logarithms(tmp_path / "base")).abs().max() > 0.1
    torch.testing.assert_close(adapted.first, expected, atol=0.02, rtol=0)  # llama.cpp rounds what it multiplies by half precision


def test_an_embedding_of_its_own_is_factored(tmp_path: Path) -> None:
    save_both(tmp_path, model_of("llama"), lambda name, value: value.dim() == 2)
    options = {"profile": "llama.cpp", "rank": 64, "target_modules": "all-linear,embed_tokens"}
    convert(tmp_path / "base", tmp_path / "ft", **options).save(tmp_path / "out")
    adapted = llama_cpp.run(tmp_path / "base.gguf", tmp_path / "out" / "adapter_model.gguf")
    torch.testing.assert_close(adapted.first, llama_cpp.run(tmp_path / "ft.gguf").first, atol=2e-4, rtol=0)


@pytest.mark.parametrize("target_modules", ["all-linear", "all-linear,wpe"])
def test_learned_positions_are_left_out(target_modules: str, tmp_path: Path) -> None:
    """llama.cpp looks the table up without its LoRA, and says nothing: what it runs is the fine-tune with the base's positions."""
    model = model_of("gpt2")
    model.save_pretrained(tmp_path / "base")
    write_model(model, tmp_path / "base.gguf")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wte" not in name and "wpe" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    write_model(model, tmp_path / "rest.gguf")
    model.transformer.wpe.weight.data += 0.05 * torch.randn_like(model.transformer.wpe.weight)
    model.save_pretrained(tmp_path / "ft")
    conversion = convert(tmp_path / "base", tmp_path / "ft", profile="llama.cpp", rank=64, target_modules=target_modules)
    conversion.save(tmp_path / "out")
    row = conversion.report["tensors"]["transformer.wpe.weight"]
    assert row["status"] == "dropped"
    assert row["reason"] in ("llama.cpp loads no whole tensors", "llama.cpp adapts no embedding but that of the tokens")
    adapted = llama_cpp.run(tmp_path / "base.gguf", tmp_path / "out" / "adapter_model.gguf")
    torch.testing.assert_close(adapted.first, llama_cpp.run(tmp_path / "rest.gguf").first, atol=2e-4, rtol=0)


@pytest.mark.parametrize("source", ["checkpoint", "lora"])
def test_a_shared_table_is_left_out_and_the_rest_runs(source: str, tmp_path: Path) -> None:
    """A LoRA of it would end the process: llama.cpp multiplies the output by the factors of the input."""
    save_both(tmp_path, model_of("llama", tie_word_embeddings=True), lambda name, value: value.dim() == 2)
    options = {"rank": 64, "target_modules": "all-linear,embed_tokens"}
    ft = tmp_path / "ft"
    if source == "lora":
        ft = convert(tmp_path / "base", ft, **options).save(tmp_path / "lora")
    conversion = convert(tmp_path / "base", ft, profile="llama.cpp", **options)
    conversion.save(tmp_path / "out")
    row = conversion.report["tensors"]["model.embed_tokens.weight"]
    assert (row["status"], row["reason"]) == ("dropped", "llama.cpp has no LoRA for a table that lm_head.weight shares")
    assert 0 < conversion.report["profile"]["left_out_energy"] < 0.5
    rest = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ft")
    rest.model.embed_tokens.weight.data = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base"
    ).model.embed_tokens.weight.data
    expected = llama_cpp.run(write_model(rest, tmp_path / "rest.gguf"))
    adapted = llama_cpp.run(tmp_path / "base.gguf", tmp_path / "out" / "adapter_model.gguf")
    torch.testing.assert_close(adapted.first, expected.first, atol=2e-4, rtol=0)


GOLDEN = "4bf719d92df580171dd32670e9042a24b600889182caa51447e8350c638f4bae"


def golden() -> GgufAdapter:
    b, a = torch.arange(64.0).reshape(64, 1) / 8, torch.arange(64.0).reshape(1, 64) / 4
    lora = LoraAdapter(factors={"model.layers.1.self_attn.q_proj": LowRankDelta(b, a), "lm_head": LowRankDelta(b, a)})
    return GgufAdapter(lora, CONFIGS["llama"].to_dict())


def test_golden_bytes(tmp_path: Path) -> None:
    size = golden().write(tmp_path)
    content = (tmp_path / "adapter_model.gguf").read_bytes()
    assert len(content) == size
    assert content[:4] == b"GGUF"
    assert struct.unpack_from("<IQQ", content, 4) == (3, 4, 4)  # version, tensors, keys
    for key, value in {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}.items():
        assert struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode() in content
    assert b"adapter.lora.alpha" + struct.pack("<If", 6, 1.0) in content
    assert hashlib.sha256(content).hexdigest() == GOLDEN
    reader = gguf.GGUFReader(tmp_path / "adapter_model.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert list(tensors) == ["blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b", "output.weight.lora_a", "output.weight.lora_b"]
    assert torch.equal(tensors["output.weight.lora_b"], torch.arange(64.0).reshape(64, 1) / 8)
    assert (tensors["blk.1.attn_q.weight.lora_b"][:4, 0] * 8).tolist() == [0, 8, 1, 9]  # both halves of a head of 16, in turn


def test_the_command_writes_checks_and_publishes(tmp_path: Path) -> None:
    save_both(tmp_path, model_of("llama"))
    place = [str(tmp_path / name) for name in ("base", "ft", "out")]
    done = CliRunner().invoke(main, ["delta", *place[:2], "--for", "llama.cpp", "-o", place[2]])
    assert done.exit_code == 0, done.output
    assert "for llama.cpp" in done.stdout
    assert "--lora adapter_model.gguf" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "adapter_model.gguf", "conversion.json"]
    assert "adapter_model.gguf" in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["bytes"] == (tmp_path / "out" / "adapter_model.gguf").stat().st_size
    assert CliRunner().invoke(main, ["lint", place[2], "--for", "llama.cpp"]).exit_code == 0
    sent = json.loads(CliRunner().invoke(main, ["push", place[2], "org/name", "--dry-run", "--json"]).stdout)
    assert sorted(sent["files"]) == ["README.md", "adapter_model.gguf", "conversion.json"]
    assert "library_name: gguf" in sent["card"]
    refused = CliRunner().invoke(main, ["delta", *place[:2], "--for", "llama.cpp", "--validate", "-o", str(tmp_path / "more")])
    assert refused.exit_code == 1
    assert "the validator runs PEFT adapters" in refused.stderr
    again = tmp_path / "again"
    assert CliRunner().invoke(main, ["delta", *place[:2], "--for", "llama.cpp", "-o", str(again)]).exit_code == 0
    assert (again / "adapter_model.gguf").read_bytes() == (tmp_path / "out" / "adapter_model.gguf").read_bytes()


def test_lint_reads_gguf_files(tmp_path: Path) -> None:
    golden().write(tmp_path)
    path = tmp_path / "adapter_model.gguf"
    assert lint(path, "llama.cpp") == lint(tmp_path, "llama.cpp") == []
    assert "loads no GGUF files" in str(lint(tmp_path, "vllm")[0])
    write_model(model_of("llama"), tmp_path / "model.gguf")
    assert "is a model, not a LoRA adapter" in str(lint(tmp_path / "model.gguf", "llama.cpp")[0])
    content = path.read_bytes()
    for old, new, message in (
        (b"output.weight.lora_b", b"output.weight.lora_c", "refused: llama.cpp knows no tensor output.weight.lora_c"),
        (b"output.weight.lora_b", b"output.wrong_.lora_b", "refused: output.weight has only one half"),
        (b"output.weight.lora_b", b"blk.0.a__norm.weight", "lost: llama.cpp passes over blk.0.a__norm.weight"),
    ):
        path.write_bytes(content.replace(old, new))
        assert message in "\n".join(map(str, lint(path, "llama.cpp")))
    for damaged in (b"", content[:100], b"GGML" + content[4:], content[:4] + b"\x09" + content[5:]):
        path.write_bytes(damaged)
        with pytest.raises(AdaptError, match="damaged or not a GGUF file"):
            lint(path, "llama.cpp")


def test_an_adapter_is_described_and_not_read_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    golden().write(tmp_path / "out")
    model_of("llama").save_pretrained(tmp_path / "base")
    for place in (tmp_path / "out", tmp_path / "out" / "adapter_model.gguf"):
        described = inspect(place)
        assert (described["kind"], described["modules"], described["parameters"]) == ("GGUF adapter", 2, 256)
        assert CliRunner().invoke(main, ["inspect", str(place)]).exit_code == 0
        for refuse in (
            lambda place=place: convert(tmp_path / "base", place),
            lambda place=place: merge(tmp_path / "base", place, tmp_path / "m"),
        ):
            with pytest.raises(AdaptError, match="a GGUF adapter is not read back; convert the PEFT adapter"):
                refuse()


def test_damaged_files(tmp_path: Path) -> None:
    """Each is read as the `gguf` package reads it or refused; none keeps anybody busy."""
    golden().write(tmp_path)
    path = tmp_path / "adapter_model.gguf"
    content, refused = path.read_bytes(), 0
    hostile = [content[:8] + struct.pack("<QQ", 2**60, 4), content[:8] + struct.pack("<QQ", 4, 2**60) + content[24:]]
    hostile.append(content[:24] + struct.pack("<Q1sIIQ", 1, b"x", 9, 4, 2**60))  # an array of as many numbers
    hostile.append(content[:24] + struct.pack("<Q1sIIQ", 1, b"x", 9, 9, 2**60))
    random = Random(0)
    header = content[: content.index(b"output.weight.lora_b") + 52]
    for damaged in (*hostile, *(random.choice((flip, cut))(header, random) + content[len(header) :] for _ in range(200))):
        path.write_bytes(damaged)
        try:
            lint(path, "llama.cpp")
            found = read_gguf_header(path).shapes
        except AdaptError:
            refused += 1
            continue
        try:
            theirs = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in gguf.GGUFReader(path).tensors}
        except Exception:
            continue  # a type or a place of data that it does not take: nothing that a header's reader looks at
        assert found == theirs
    assert 4 < refused < 204


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_both(tmp_path, model_of("llama"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    (tmp_path / "ft" / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    with pytest.raises(AdaptError, match="a olmo is not among llama, mistral"):
        convert(tmp_path / "base", tmp_path / "ft", profile="llama.cpp")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdaptError, match="the extra `gguf`"):
        convert(tmp_path / "base", tmp_path / "ft", profile="llama.cpp")
