"""Conversions end to end: what is reported, what is kept, and what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_pair
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.convert.pairs import _energy

PREFIX = "base_model.model."


def factors(directory: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    written = load_file(directory / "adapter_model.safetensors")
    return tuple(written[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "BA")


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "conversion.json").read_text())


def test_b_is_the_best_for_the_a_that_is_written(pairs: Any, tmp_path: Path) -> None:
    """By `torch.linalg.lstsq`; a B that was not fitted to the rounded A is a step away in many entries."""
    pair, module = pairs("llama"), "model.layers.0.mlp.up_proj"
    out = adapt_convert.convert(pair.base, pair.ft, rank=5, dtype="bfloat16").save(tmp_path / "out")
    new, old = (load_file(path / "model.safetensors")[f"{module}.weight"].double() for path in (pair.ft, pair.base))
    b, a = factors(out, module)
    best = torch.linalg.lstsq(a.T, (new - old).T).solution.T.bfloat16().double()
    assert (b == best).double().mean() > 0.98


def test_energies_of_long_tensors_are_no_single_sum() -> None:
    """Of equal numbers, which float32 adds up to a thousandth too little."""
    change = torch.full((2**19 + 100,), 0.1)
    exact = float(change.double().square().sum())
    assert _energy(change) == pytest.approx(exact, rel=1e-5)
    assert _energy(change + 1, torch.ones_like(change)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "vit", "t5"])
def test_every_matrix_captures_what_the_full_svd_does(pairs: Any, tmp_path: Path, name: str, dtype: str) -> None:
    pair = pairs(name)
    out = adapt_convert.convert(pair.base, pair.ft, rank=5, dtype=dtype).save(tmp_path / "out")
    base, ft, report = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors"), report_of(out)
    written = load_file(out / "adapter_model.safetensors")
    total = residual = 0.0
    rows = {tensor: row for tensor, row in report["tensors"].items() if row["status"] == "factored"}
    assert len(rows) >= 8
    for tensor, row in rows.items():
        (key,) = row["source_tensors"]
        delta = (ft[key] - base[key]).double()
        module = tensor.removesuffix(".weight")
        b, a = (written[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "BA")
        product = (b @ a).T if name == "gpt2" else b @ a
        error = float((delta - product).square().sum())
        energies = torch.linalg.svdvals(delta).square()
        captured = 1 - error / float(energies.sum())
        assert row["captured_energy"] == pytest.approx(captured, rel=1e-4)
        assert captured >= 0.9999 * float(energies[:5].sum() / energies.sum())
        assert row["rank"] == min(5, *delta.shape) == b.shape[1]
        total, residual = total + float(energies.sum()), residual + error
    assert report["captured_energy"] == pytest.approx(1 - residual / total, rel=1e-4)
    assert report["bytes"] == (out / "adapter_model.safetensors").stat().st_size


def test_every_source_tensor_has_its_entry(pairs: Any, tmp_path: Path) -> None:
    for name in ("qwen2", "gpt2", "roberta"):
        pair = pairs(name)
        for target in ("lora", "lorta"):
            out = adapt_convert.convert(pair.base, pair.ft, to=target, rank=2).save(tmp_path / f"{name}-{target}")
            report = report_of(out)
            keys = [key for row in report["tensors"].values() for key in row["source_tensors"]]
            assert sorted(keys) == sorted(load_file(pair.ft / "model.safetensors"))
            statuses = {row["status"] for row in report["tensors"].values()}
            assert statuses <= {"factored", "exact", "unchanged", "dropped"}
            assert all(row["reason"] for row in report["tensors"].values() if row["status"] == "dropped")


def test_unchanged_matrices_have_no_factors(make_pair: Any, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.model.layers[1].self_attn.q_proj.weight += 0.01 * torch.randn(32, 32)

    pair = make_pair(tmp_path, "qwen2", change)
    out = adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path / "out")
    assert sorted(load_file(out / "adapter_model.safetensors")) == [
        f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB"
    ]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert config["modules_to_save"] is None
    assert config["lora_bias"] is False
    assert {row["status"] for row in report_of(out)["tensors"].values()} == {"factored", "unchanged"}
    pair.load_peft(out)


def test_a_bias_alone_survives_beside_an_unchanged_matrix(make_pair: Any, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.model.layers[0].self_attn.k_proj.bias += 0.5
        model.model.layers[1].self_attn.q_proj.weight += 0.3 * torch.randn(32, 1) @ torch.randn(1, 32)

    pair = make_pair(tmp_path, "qwen2", change)
    out = adapt_convert.convert(pair.base, pair.ft, rank=1, strict=True).save(tmp_path / "out")
    torch.testing.assert_close(pair.logits(pair.load_peft(out)), pair.logits(pair.load(pair.ft)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "refuses"), [("qwen2", True), ("bert", False), ("llama", False)])
def test_a_merge_that_peft_refuses_is_announced(pairs: Any, tmp_path: Path, name: str, refuses: bool) -> None:
    """`lora_bias` is one switch for all matrices, and peft merges none of them where one has no bias."""
    pair = pairs(name)
    announced = any("refuses to merge" in note for note in adapt_convert.inspect(pair.base, pair.ft)["notes"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pair.load_peft(adapt_convert.convert(pair.base, pair.ft, rank=2).save(tmp_path / "out"))
        if refuses:
            with pytest.raises(RuntimeError, match="has no bias"):
                model.merge_and_unload()
        else:
            model.merge_and_unload()
    assert announced == refuses


def test_ranks_by_energy(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, energy=0.8).save(tmp_path / "out")
    rows = [row for row in report_of(out)["tensors"].values() if row["status"] == "factored"]
    assert all(row["captured_energy"] >= 0.8 - 1e-6 for row in rows)
    assert len({row["rank"] for row in rows}) > 1
    pair.load_peft(out)


def test_a_budget_is_spent_where_it_captures_most(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    budget = 20_000
    out = adapt_convert.convert(pair.base, pair.ft, budget=budget).save(tmp_path / "out")
    report = report_of(out)
    sizes = [v.numel() * 4 for k, v in load_file(out / "adapter_model.safetensors").items() if "lora_" in k]
    assert 0.9 * budget < sum(sizes) <= budget
    # No exchange of one rank for another of the same cost gains: the least kept beats the best left out.
    base, ft = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    kept, left = [], []
    for tensor, row in report["tensors"].items():
        if row["status"] == "factored" or row.get("reason", "").startswith("the budget"):
            values = torch.linalg.svdvals((ft[tensor] - base[tensor]).double()).square() / sum(ft[tensor].shape)
            rank = row.get("rank", 0)
            kept += values[:rank].tolist()
            left += values[rank : rank + 1].tolist()
    cheapest = min(sum(ft[t].shape) for t, row in report["tensors"].items() if row["status"] == "factored")
    assert budget - sum(sizes) < 4 * max(sum(v.shape) for v in ft.values() if v.ndim == 2)
    assert sorted(kept)[1] >= sorted(left)[-1] or budget - sum(sizes) < 4 * cheapest


def test_strict_refuses_what_the_target_leaves_out(pairs: Any) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match=r"--strict: model\.layers\.0\.mlp"):
        adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2, strict=True)
    adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2, strict=True, exclude=("gate_proj", "up_proj", "down_proj"))
    adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2, strict=True, target_modules=("all-linear",))


@pytest.mark.parametrize("target", ["lora", "lorta"])
def test_same_seed_same_bytes(pairs: Any, tmp_path: Path, target: str) -> None:
    pair = pairs("llama")
    first, second = (adapt_convert.convert(pair.base, pair.ft, to=target, rank=3, seed=5).save(tmp_path / name) for name in ("a", "b"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_an_embedding_can_be_factored(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=32, target_modules=("all-linear", "embed_tokens")).save(tmp_path / "o")
    assert report_of(out)["tensors"]["model.embed_tokens.weight"]["status"] == "factored"
    torch.testing.assert_close(pair.logits(pair.load_peft(out)), pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-4)


_PEAK = """
import resource, sys, adapt_convert
adapt_convert.convert(sys.argv[1], sys.argv[2], rank=4, device="cpu").save(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_grows_with_the_largest_tensor_and_not_with_the_model(tmp_path: Path) -> None:
    """Forty layers take no more memory than four but for their factors; a sharded pair of 4 and 40 times two 4 MB matrices."""
    peaks = {}
    for layers in (4, 40):
        for side in ("base", "ft"):
            directory = tmp_path / f"{side}{layers}"
            directory.mkdir()
            weight_map = {}
            for layer in range(layers):
                file = f"model-{layer:05d}.safetensors"
                names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("up", "gate")]
                save_file({name: torch.randn(1024, 1024) for name in names}, directory / file)
                weight_map |= dict.fromkeys(names, file)
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        paths = [str(tmp_path / f"{name}{layers}") for name in ("base", "ft", "out")]
        run = subprocess.run([sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True)
        peaks[layers] = int(run.stdout)
    factor_bytes = 36 * 2 * 2 * 1024 * 4 * 4
    assert peaks[40] - peaks[4] < 2 * factor_bytes + 16 * 2**20, peaks  # 36 more layers hold 288 MB on each side


@pytest.mark.parametrize("name", ["llama-tied", "llama", "bert"])
def test_a_factored_embedding_reaches_every_module_that_shares_it(make_pair: Any, tmp_path: Path, name: str) -> None:
    def change(model: Any) -> None:
        for key, parameter in model.named_parameters():
            if not key.endswith("bias"):  # PEFT holds no changed bias beside a LoRA of an embedding
                parameter += 0.05 * torch.randn_like(parameter)

    pair = make_pair(tmp_path, name, change)
    embedding = "word_embeddings" if name == "bert" else "embed_tokens"
    targets = ("all-linear", embedding)
    out = adapt_convert.convert(pair.base, pair.ft, rank=64, target_modules=targets, strict=True).save(tmp_path / "out")
    expected = pair.logits(pair.load(pair.ft))
    torch.testing.assert_close(pair.logits(pair.load_peft(out)), expected, atol=2e-4, rtol=1e-4)
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), expected, atol=2e-4, rtol=1e-4)


def test_merge_leaves_a_tied_head_where_peft_leaves_it(make_pair: Any, tmp_path: Path) -> None:
    import peft

    pair = make_pair(tmp_path, "llama-tied")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of the tied embedding
        model = peft.get_peft_model(pair.load(pair.base), config).eval()
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapt_convert.merge(pair.base, tmp_path / "adapter", tmp_path / "merged")
    merged = pair.logits(pair.load(tmp_path / "merged"))
    torch.testing.assert_close(merged, pair.logits(model), atol=2e-4, rtol=1e-4)
    again = adapt_convert.convert(pair.base, tmp_path / "adapter", rank=4).save(tmp_path / "again")
    torch.testing.assert_close(pair.logits(pair.load_peft(again)), merged, atol=2e-4, rtol=1e-4)


def test_changed_biases_beside_a_factored_embedding_are_refused(pairs: Any) -> None:
    pair = pairs("qwen2")
    with pytest.raises(AdaptError, match=r"PEFT cannot hold a LoRA of model\.embed_tokens beside changed biases"):
        adapt_convert.convert(pair.base, pair.ft, rank=4, target_modules=("all-linear", "embed_tokens"))


@pytest.mark.parametrize(("name", "options"), [("gpt2", {"target_modules": "c_attn"}), ("qwen2", {"budget": "3kB"})])
def test_what_is_reported_dropped_is_not_in_the_file(pairs: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    pair = pairs(name)
    out = adapt_convert.convert(pair.base, pair.ft, **options).save(tmp_path / "out")
    names = {key.removeprefix(PREFIX) for key in load_file(out / "adapter_model.safetensors")}
    dropped = {tensor for tensor, row in report_of(out)["tensors"].items() if row["status"] == "dropped"}
    assert dropped
    assert not dropped & names
    pair.load_peft(out)


def test_an_adapter_of_the_embedding_alone_can_be_merged(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=4, target_modules="embed_tokens").save(tmp_path / "out")
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged")), pair.logits(pair.load_peft(out)), atol=2e-4, rtol=1e-4)


def test_python_understands_options_as_typed(pairs: Any) -> None:
    pair = pairs("llama")
    typed = adapt_convert.convert(pair.base, pair.ft, rank="4", exclude="lm_head, embed_tokens", target_modules="q_proj,v_proj")
    plain = adapt_convert.convert(pair.base, pair.ft, rank=4, exclude=("lm_head", "embed_tokens"), target_modules=["q_proj", "v_proj"])
    assert typed.report["options"] == plain.report["options"]
    unsaid = dict.fromkeys(("to", "energy", "exclude", "target_modules", "dtype", "seed", "orientation", "calib_tokens"))
    assert (
        adapt_convert.convert(pair.base, pair.ft, rank=4, **unsaid).report["options"]
        == adapt_convert.convert(pair.base, pair.ft, rank=4).report["options"]
    )
    for wrong in ({"rank": True}, {"energy": "0.x"}, {"exclude": 3}, {"seed": "x"}):
        with pytest.raises(AdaptError):
            adapt_convert.convert(pair.base, pair.ft, **wrong)


def test_the_head_of_question_answering_is_factored_and_loaded_by_peft(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    pair = save_pair(tmp_path, BertForQuestionAnswering, BertConfig(vocab_size=96, **sizes))
    adapter = adapt_convert.convert(pair.base, pair.ft, rank=16).save(tmp_path / "lora")
    model, ft = pair.load_peft(adapter), pair.load(pair.ft)
    with torch.no_grad():
        torch.testing.assert_close(model(**pair.inputs).start_logits, ft(**pair.inputs).start_logits, rtol=1e-4, atol=1e-5)
