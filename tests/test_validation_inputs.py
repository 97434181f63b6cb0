"""What `validate` runs on, what it refuses in one line, and how exact its shortcut for large vocabularies is."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import files_of_at_most
from conftest import save_pair
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    CLIPConfig,
    CLIPModel,
    RwkvConfig,
    RwkvForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import adapt_convert
from adapt_convert.convert.validation import reference_outputs
from adapt_convert.convert.validation.live_model import load_model, require_run_extra
from adapt_convert.convert.validation.outputs import Predictions
from adapt_convert.convert.validation.reference_outputs import ReferenceOutputs
from adapt_convert.convert.validation.texts import built_in_text, make_corpus, read_documents
from adapt_convert.convert.validation.validate import validate
from adapt_convert.convert.validation.verdict import Thresholds
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import locate

IDS = [[(7 * i + 3 * j) % 90 + 3 for i in range(20)] for j in range(4)]


def with_tokenizer(source: Path, directory: Path) -> Path:
    """A copy of a model with a word tokenizer of 96 words, made by the `tokenizers` library."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copytree(source, directory)
    words = {"[UNK]": 0, "[MASK]": 1} | {f"w{i}": i + 2 for i in range(94)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + 5 * i) % 94}" for i in range(count))


def test_top_k_bounds_the_exact_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, mine = (torch.randn(50, 400, generator=generator) * 3 for _ in range(2))
    row, targets = torch.zeros(50, dtype=torch.long), torch.randint(0, 400, (50,), generator=generator)
    exact = torch.nn.functional.kl_div(
        mine.double().log_softmax(-1), reference.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found = {}
    for k in (0, 300, 40):
        with ReferenceOutputs(1, full_limit=0 if k else 2, top_k=k or 1) as outputs:
            itself = outputs.keep_predictions(0, Predictions(reference, targets, row, True))
            found[k] = outputs.compare(0, Predictions(mine, targets, row, True))
        assert itself.divergence.abs().max() < 1e-9
        assert (found[k].divergence <= exact + 1e-9).all()
        assert (found[k].upper >= exact - 1e-9).all()
        torch.testing.assert_close(found[k].agree, (reference.argmax(-1) == mine.argmax(-1)).double())
        torch.testing.assert_close(found[k].nll, torch.nn.functional.cross_entropy(mine.double(), targets, reduction="none"))
    torch.testing.assert_close(found[0].divergence, exact)
    torch.testing.assert_close(found[0].upper, exact)
    gap = {k: float((f.upper - f.divergence).mean()) for k, f in found.items()}
    assert gap[0] == 0 < gap[300] < gap[40]


def test_a_validation_on_top_k_says_so(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    exact = validate(pair.base, pair.ft, pair.base, token_ids=IDS, speed=False).base.fidelity
    monkeypatch.setattr(reference_outputs.ReferenceOutputs.__init__, "__defaults__", (0, 32))
    result = validate(pair.base, pair.ft, pair.base, token_ids=IDS, speed=False)
    found = result.base.fidelity
    assert result.to_json()["settings"]["top_k"] == 32
    assert found.kl < exact.kl < found.kl_upper
    assert found.perplexity == pytest.approx(exact.perplexity)
    assert found.top1 == exact.top1


def test_nothing_is_left_in_the_temporary_directory(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pair = pairs("llama")
    validate(pair.base, pair.ft, pair.ft, token_ids=IDS, speed=False)
    with pytest.raises(AdaptError):
        validate(pair.base, pair.base, pair.ft, token_ids=IDS, speed=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(AdaptError, match=r"bytes free, .* set TMPDIR to a larger disk"):
        ReferenceOutputs(2**62, full_limit=2**63)
    with ReferenceOutputs(1) as outputs, files_of_at_most(100), pytest.raises(AdaptError, match=r"cannot be written .*; set TMPDIR"):
        outputs.keep("logits", torch.zeros(1000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["whisper", "clip"])
def test_models_that_need_more_than_text_are_one_line(name: str, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "clip":
        towers = {
            "text_config": small | text | {"max_position_embeddings": 64},
            "vision_config": small | {"image_size": 16, "patch_size": 8},
        }
        pair = save_pair(tmp_path, CLIPModel, CLIPConfig(**towers, projection_dim=8))
    else:
        layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 16}
        pair = save_pair(tmp_path, WhisperForConditionalGeneration, WhisperConfig(**text, **layers, **widths))
    with pytest.raises(AdaptError, match="does not run on plain input_ids"):
        validate(pair.base, pair.ft, pair.ft, token_ids=IDS, speed=False)


def test_a_forward_pass_that_fails_is_one_line(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    pair = save_pair(tmp_path, BertForMultipleChoice, BertConfig(vocab_size=96, **sizes))  # wants rows of choices
    with pytest.raises(AdaptError, match="BertForMultipleChoice does not run on plain input_ids: shape"):
        validate(pair.base, pair.ft, pair.ft, token_ids=IDS, speed=False)


def test_a_model_without_gradients_keeps_its_figures(tmp_path: Path) -> None:
    config = RwkvConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=16)
    pair = save_pair(tmp_path, RwkvForCausalLM, config)  # which changes its state in place
    result = validate(pair.base, pair.ft, pair.ft, token_ids=IDS, speed=False).to_json()
    details = result["candidates"][0]["details"]
    assert result["candidates"][0]["recovered"] == pytest.approx(1)
    assert details["attribution"]["note"].startswith("no gradients: one of the variables needed")


def test_text_is_cut_into_whole_blocks(pairs: Any, tmp_path: Path) -> None:
    ft = with_tokenizer(pairs("llama").ft, tmp_path / "ft")
    (tmp_path / "plain.txt").write_text(words(35))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": words(7, start)}) + "\n" for start in range(3)))
    config, where = json.loads((ft / "config.json").read_text()), [locate(ft)]
    plain = make_corpus("causal", config, where, tmp_path / "plain.txt", None, 8, 10**6)
    assert [len(row) for row in plain.rows] == [8, 8, 8, 8]
    assert torch.cat(plain.rows).tolist() == [(5 * i) % 94 + 2 for i in range(32)]
    assert [len(row) for row in make_corpus("causal", config, where, tmp_path / "rows.jsonl", None, 8, 10**6).rows] == [8, 8]
    assert [len(row) for row in make_corpus("classes", config, where, tmp_path / "rows.jsonl", None, None, 10**6).rows] == [7, 7, 7]
    assert len(make_corpus("causal", config, where, tmp_path / "plain.txt", None, 8, 16).rows) == 2
    assert built_in_text()[0].startswith("built-in: Python")
    assert read_documents(tmp_path / "rows.jsonl") == [words(7, start) for start in range(3)]


def test_masked_models_are_scored_where_they_are_masked(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("bert")
    ft = with_tokenizer(pair.ft, tmp_path / "ft")
    (tmp_path / "text.txt").write_text(words(200))
    result = validate(pair.base, ft, pair.base, text=tmp_path / "text.txt", context=20, speed=False)
    assert result.base.fidelity.perplexity > 1
    assert result.fine_tune_perplexity > 1
    assert validate(pair.base, ft, pair.base, token_ids=IDS, speed=False).base.fidelity.perplexity is None


REFUSALS = [
    ({"token_ids": IDS, "context": 21}, r"has 20 tokens, fewer than --context 21"),
    ({"token_ids": IDS, "context": 1}, r"--context 1: must be at least 2"),
    ({"token_ids": [[1, 2, 96]]}, r"token 96, but the model knows 96 tokens"),
    ({}, r"no tokenizer in it; .*--token-ids"),
    ({"text": "nowhere.txt", "token_ids": IDS}, r"contradict each other"),
    ({"token_ids": "nowhere.jsonl"}, r"nowhere.jsonl: cannot be read"),
    ({"token_ids": IDS, "batch": 0}, r"--batch 0"),
    ({"token_ids": IDS, "dtype": "int8"}, r"--dtype int8"),
    ({"token_ids": IDS, "thresholds": {"min_recovered": 2.0}}, r"--min-recovered 2.0"),
    ({"token_ids": IDS, "thresholds": {"min_recovered": math.nan}}, r"--min-recovered nan"),
    ({"token_ids": IDS, "thresholds": {"min_top1": -0.5}}, r"--min-top1 -0.5"),
    ({"token_ids": IDS, "thresholds": {"max_kl": math.inf}}, r"--max-kl inf"),
    ({"token_ids": [[-1, 5, 6]]}, r"token_ids: holds a negative number"),
    ({"token_ids": [["a"]]}, r"token_ids: expected rows of whole numbers"),
    ({"token_ids": 7}, r"token_ids: expected rows of whole numbers"),
    ({"token_ids": IDS, "thresholds": {"max_slowdown": 1.5}}, r"--max-slowdown and --no-speed contradict"),
    ({"token_ids": IDS, "seed": -1}, r"--seed -1"),
    ({"token_ids": IDS, "seed": 2**64}, r"--seed 18446744073709551616"),
    ({"token_ids": IDS, "tasks": ("x",)}, r"--tasks x: no candidate is a bundle"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(pairs: Any, options: dict[str, Any], message: str) -> None:
    pair = pairs("llama")
    limits = options.get("thresholds")
    with pytest.raises(AdaptError, match=message) as refusal:
        validate(pair.base, pair.ft, pair.ft, speed=False, **options | ({"thresholds": Thresholds(**limits)} if limits else {}))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("line", ["{", '{"ids": [1]}', '{"input_ids": []}', '{"input_ids": [1.5]}', '{"input_ids": [true]}', "[1, 2]"])
def test_malformed_token_ids_name_the_line(pairs: Any, tmp_path: Path, line: str) -> None:
    pair = pairs("llama")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [4, 5, 6]}\n' + line + "\n")
    with pytest.raises(AdaptError, match=r"ids.jsonl, line 2"):
        validate(pair.base, pair.ft, pair.ft, token_ids=tmp_path / "ids.jsonl", speed=False)


def test_a_checkpoint_with_a_hole_is_refused(pairs: Any, tmp_path: Path) -> None:
    """transformers fills it with random numbers, and what is left may still recover enough to pass."""
    pair = pairs("llama")
    shutil.copytree(pair.ft, tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.gate_proj.weight"]
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdaptError, match=r"merged: lacks model.layers.1.mlp.gate_proj.weight and 1 more"):
        validate(pair.base, pair.ft, tmp_path / "merged", token_ids=IDS, speed=False)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def with_other_shapes(path: Path) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(50, 32)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(("damage", "message"), [(cut, r"{}.*bytes"), (with_other_shapes, r"up_proj.*{}")])
@pytest.mark.parametrize("damaged", ["ft", "merged"])
def test_a_damaged_checkpoint_is_refused_in_one_line(pairs: Any, tmp_path: Path, damaged: str, damage: Any, message: str) -> None:
    pair = pairs("llama")
    shutil.copytree(pair.ft, tmp_path / damaged)
    damage(tmp_path / damaged / "model.safetensors")
    paths = (tmp_path / "ft", pair.ft) if damaged == "ft" else (pair.ft, tmp_path / "merged")
    with pytest.raises(AdaptError, match=message.format(damaged)):
        validate(pair.base, *paths, token_ids=IDS, speed=False)
    with pytest.raises(AdaptError, match=rf"{damaged}: transformers cannot load it"):
        load_model(locate(tmp_path / damaged), pair.model_class, torch.device("cpu"), None)


def test_another_architecture_is_refused_before_it_is_built(pairs: Any, tmp_path: Path) -> None:
    pair, other = pairs("llama"), pairs("mistral")
    for paths in ((pair.base, pair.ft, other.ft), (other.base, pair.ft, pair.ft)):
        with pytest.raises(AdaptError, match=r"says model_type mistral, that of .* llama: it is another model"):
            validate(*paths, token_ids=IDS, speed=False)
    shutil.copytree(pair.ft, tmp_path / "merged")
    config = json.loads((pair.ft / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(AdaptError, match=r"says architectures .*LlamaForSequenceClassification"):
        validate(pair.base, pair.ft, tmp_path / "merged", token_ids=IDS, speed=False)


def test_documents_without_text_are_left_out(pairs: Any, tmp_path: Path) -> None:
    ft = with_tokenizer(pairs("llama").ft, tmp_path / "ft")
    config, where = json.loads((ft / "config.json").read_text()), [locate(ft)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", words(7), "  \n", words(9))))
    assert [len(row) for row in make_corpus("classes", config, where, path, None, None, 10**6).rows] == [7, 9]
    path.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(AdaptError, match=r"rows.jsonl: holds no text"):
        make_corpus("classes", config, where, path, None, None, 10**6)


def test_a_small_corpus_is_warned_of(pairs: Any) -> None:
    config = json.loads((pairs("llama").ft / "config.json").read_text())
    for rows, said in (([[5] * 4], "only 4 tokens in a single row"), (IDS, "only 80 tokens in 4 rows"), ([[5] * 300], "in a single row")):
        assert said in (make_corpus("causal", config, [], None, rows, None, 10**6).warning or "")
    assert make_corpus("causal", config, [], None, [[5] * 128] * 2, None, 10**6).warning is None


def test_thresholds_of_another_type_are_refused(pairs: Any) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match=r"thresholds=0.9: give a Thresholds"):
        validate(pair.base, pair.ft, pair.ft, token_ids=IDS, thresholds=0.9)  # type: ignore[arg-type]


def test_a_nested_vocabulary_is_checked(pairs: Any) -> None:
    config = {"text_config": {"vocab_size": 90}}
    with pytest.raises(AdaptError, match=r"token 95, but the model knows 90"):
        make_corpus("causal", config, [], None, [[5, 95]], None, 10**6)


@pytest.mark.parametrize("damaged", ["base", "ft"])
def test_outputs_that_are_not_finite_are_refused(pairs: Any, tmp_path: Path, damaged: str) -> None:
    pair = pairs("llama")
    paths = {"base": pair.base, "ft": pair.ft} | {damaged: tmp_path / damaged}
    shutil.copytree(getattr(pair, damaged), tmp_path / damaged)
    weights = load_file(tmp_path / damaged / "model.safetensors")
    weights["model.norm.weight"] *= 1e38  # finite itself
    save_file(weights, tmp_path / damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdaptError, match=rf"{damaged}: its outputs are NaN or infinite"):
        validate(*paths.values(), pair.ft, token_ids=IDS, speed=False)


def test_out_of_memory_says_what_to_lower(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(sys.modules[validate.__module__], "predict", full)
    pair = pairs("llama")
    with pytest.raises(AdaptError, match=r"out of memory at --context 8 --batch 2: lower --batch or --context"):
        validate(pair.base, pair.ft, pair.ft, token_ids=IDS, context=8, batch=2, speed=False)


def test_the_extra_is_named_when_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdaptError, match=r"adapt-convert\[run\]"):
        require_run_extra()


def test_equal_models_leave_nothing_to_validate(pairs: Any) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match="same outputs"):
        validate(pair.ft, pair.ft, pair.base, token_ids=IDS, speed=False)


def test_batches_change_nothing(pairs: Any) -> None:
    pair = pairs("llama")
    one, four = (validate(pair.base, pair.ft, pair.base, token_ids=IDS, batch=size, speed=False).base.fidelity for size in (1, 4))
    assert one.kl == pytest.approx(four.kl, rel=1e-5)
    assert one.kl_ci95 == pytest.approx(four.kl_ci95, rel=1e-4)


OTHER_BASES: dict[str, tuple[str, dict[str, int]]] = {
    "narrower": ("llama", {"hidden_size": 16}),
    "deeper": ("llama", {"num_hidden_layers": 3}),
    "of another type": ("gpt2", {}),
    "of a like type": ("qwen2", {}),
}


@pytest.mark.parametrize("exclude", ["", "embed_tokens,lm_head,norm"])  # with and without values that are stored whole
@pytest.mark.parametrize("other_base", OTHER_BASES)
def test_a_latte_of_another_base_fails_in_one_line(other_base: str, exclude: str, pairs: Any, make_pair: Any, tmp_path: Path) -> None:
    name, changes = OTHER_BASES[other_base]
    other = make_pair(tmp_path, name, **changes)
    latte = adapt_convert.convert(other.base, other.ft, to="latte", rank=2, exclude=exclude).save(tmp_path / "latte")
    own = adapt_convert.convert(pairs("llama").base, pairs("llama").ft, to="latte", rank=32).save(tmp_path / "own")
    result = validate(pairs("llama").base, pairs("llama").ft, latte, own, token_ids=IDS, speed=False)
    (line,) = result.failures
    assert line.startswith(f"{latte}: ")
    assert line.count(str(latte)) == 1
    assert "made for another base" in line or "is made for" in line
    assert result.candidates[1].fidelity is not None


def test_a_failing_task_of_a_bundle_is_named(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    one = adapt_convert.convert(pair.base, pair.ft, to="lora", rank=1, exclude="embed_tokens,norm").save(tmp_path / "one")
    both = adapt_convert.bundle(pair.base, [pair.ft, one], rank=2, exclude="embed_tokens,lm_head").save(tmp_path / "both")
    result = validate(pair.base, pair.ft, both, tasks=["ft", "one"], token_ids=IDS, speed=False, attribution=False)
    assert {line.partition(": ")[0] for line in result.failures} == {f"{both} [ft]", f"{both} [one]"}
