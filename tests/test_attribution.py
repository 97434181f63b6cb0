"""The KL by matrix against KLs measured with plain `transformers`, and LatTE's energies against dense algebra."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.convert.delta import DenseDelta
from adapt_convert.convert.validation import attribution
from adapt_convert.convert.validation.attribution import Change, removed_kl
from adapt_convert.convert.validation.outputs import Batch
from adapt_convert.convert.validation.validate import validate

IDS = [[(7 * i + 3 * j) % 90 + 3 for i in range(20)] for j in range(4)]


def run(pair: Any, *candidates: Path, **options: Any) -> Any:
    ids = {} if "pixel_values" in pair.inputs else {"token_ids": IDS}
    return validate(pair.base, pair.ft, *candidates, **(ids | {"speed": False} | options))


@torch.no_grad()
def kl(reference: Any, model: Any) -> float:
    """By PyTorch's own `kl_div`, summed over the predictions on IDS."""
    p, q = (m(input_ids=torch.tensor(IDS)).logits.double().log_softmax(-1) for m in (reference, model))
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))


RESIDUAL = ("llama", "llama-tied", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit")
SCORE = ("gpt2", "bert", "roberta", "vit")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit", "t5"])
def test_shares_of_every_kind_sum_to_the_measured_kl(pairs: Any, tmp_path: Path, name: str) -> None:
    pair = pairs(name)

    def adapter(directory: str, **options: Any) -> Path:
        return adapt_convert.convert(pair.base, pair.ft, **options).save(tmp_path / directory)

    lora = adapter("lora", rank=4)
    adapt_convert.merge(pair.base, lora, tmp_path / "merged")
    candidates = [lora, tmp_path / "merged", pair.ft, adapter("lorta", to="lorta", rank=4)]
    candidates += [adapter("latte", to="latte", rank=8)] if name in RESIDUAL else []
    candidates += [adapter("score", to="latte", rank=4, construction="score")] if name in SCORE else []
    for row in run(pair, *candidates).candidates:
        found = row.attribution
        # The changes of these random models are large, and T5 does not scale its scores: that leaves 1 % at most, or 0.002 nats.
        rel, tolerance = (1e-2, 2e-3) if name == "t5" else (2e-3, 1e-3)
        assert found.total == pytest.approx(found.measured, rel=rel, abs=tolerance), row.contender.path
        details = row.to_json()["details"]
        shares = [matrix["recovered_kl"] or 0.0 for matrix in details["matrices"].values()]
        assert sum(shares) + details["attribution"]["other"] == pytest.approx(found.total)
        other = details["attribution"]["largest_other"]
        assert other is None or found.removed[other[0]] == other[1]
        assert details["attribution"]["rows"] == (8 if name == "vit" else 4)
        assert details["attribution"]["note"] is None


def test_one_matrix_alone_has_the_whole_of_what_it_removes(make_pair: Any, tmp_path: Path) -> None:
    """The share of a single changed matrix is the difference of KLs that plain models give; the base is not touched."""

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    pair = make_pair(tmp_path, "llama", change)
    ft, base = pair.load(pair.ft), pair.load(pair.base).requires_grad_(False)
    names = ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
    names += ["model.layers.1.post_attention_layernorm.weight", "lm_head.weight"]
    deltas = {name: (ft.get_parameter(name) - base.get_parameter(name)).detach() for name in names}
    before = {name: value.clone() for name, value in base.state_dict().items()}
    changes = [Change(name, lambda delta=delta: DenseDelta(delta.reshape(len(delta), -1))) for name, delta in deltas.items()]
    batch = Batch({"input_ids": torch.tensor(IDS)}, None, None)
    reference = ft(input_ids=torch.tensor(IDS)).logits.detach().flatten(0, 1)
    of_base = kl(ft, base)
    for change_of_one in changes:
        (share,) = removed_kl(base, batch, reference, [change_of_one], attribution.quadrature()[0]).values()
        moved = pair.load(pair.base)
        moved.get_parameter(change_of_one.name).data += deltas[change_of_one.name]
        assert share == pytest.approx(of_base - kl(ft, moved), rel=1e-3)
    together = removed_kl(base, batch, reference, changes, attribution.quadrature()[0])
    moved = pair.load(pair.base)
    for name, delta in deltas.items():
        moved.get_parameter(name).data += delta
    assert sum(together.values()) == pytest.approx(of_base - kl(ft, moved), rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())


def test_half_precision_does_not_round_the_line_away(pairs: Any, make_pair: Any, tmp_path: Path) -> None:
    """In bfloat16 the base plus a thousandth of itself is the base; the line from it to the adapter still has its shares."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter += 1e-3 * torch.randn_like(parameter)

    pair = make_pair(tmp_path, "llama", change, initializer_range=0.5)
    lora = adapt_convert.convert(pair.base, pair.ft, rank=16).save(tmp_path / "lora")
    exact, half = (run(pair, lora, dtype=dtype).candidates[0].attribution for dtype in ("float32", "bfloat16"))
    assert exact.total == pytest.approx(exact.measured, rel=1e-3)
    largest = sorted(exact.removed, key=lambda name: -exact.removed[name])[:3]
    assert all(half.removed[name] > 0 for name in largest)


def test_shares_that_do_not_sum_are_left_out(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    lora = adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path / "lora")
    monkeypatch.setattr(attribution, "_hook_for", lambda *arguments: lambda module, inputs, output: output)
    row = run(pair, lora).candidates[0]
    details = row.to_json()["details"]
    assert "sum to 0.0% of the base's KL" in details["attribution"]["note"]
    assert {matrix["recovered_kl"] for matrix in details["matrices"].values()} == {None}


def test_a_head_that_the_base_lacks_has_its_share(pairs: Any, tmp_path: Path) -> None:
    """The base is a bare backbone, as published; the classifier that it runs with is random, and most of the KL."""
    pair = pairs("roberta")
    shutil.copytree(pair.base, tmp_path / "base")
    weights = load_file(pair.base / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    lora = adapt_convert.convert(tmp_path / "base", pair.ft, rank=8).save(tmp_path / "lora")
    found = validate(tmp_path / "base", pair.ft, lora, token_ids=IDS, speed=False).candidates[0].attribution
    assert found.total == pytest.approx(found.measured, rel=1e-2)
    assert any("classifier" in name for name in found.removed)


def test_models_without_a_distribution_have_none(make_pair: Any, pairs: Any, tmp_path: Path) -> None:
    pair = pairs("bert")
    for name in ("base", "ft"):
        shutil.copytree(pair.base.parent / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    row = validate(tmp_path / "base", tmp_path / "ft", tmp_path / "ft", token_ids=IDS, speed=False).candidates[0]
    assert row.to_json()["details"]["attribution"] == {"note": "the outputs are no distribution"}


def test_energies_of_a_latte_equal_dense_algebra(pairs: Any, tmp_path: Path) -> None:
    """Of effective matrices `W diag(g)`, from the blocks as written; the conversion's own record says the same."""
    pair = pairs("llama")
    latte = adapt_convert.convert(pair.base, pair.ft, to="latte", rank=8).save(tmp_path / "latte")
    row = run(pair, latte).candidates[0]
    matrices, written = row.to_json()["details"]["matrices"], load_file(latte / "latte.safetensors")
    recorded = json.loads((latte / "conversion.json").read_text())["tensors"]
    base, ft = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    Q = written["segment.0.Q"]
    for module, norm in (("self_attn.k_proj", "input_layernorm"), ("mlp.up_proj", "post_attention_layernorm"), ("mlp.down_proj", None)):
        name = f"model.layers.1.{module}"
        new, old = (w[f"{name}.weight"] * (w[f"model.layers.1.{norm}.weight"] if norm else 1.0) for w in (ft, base))
        block = written[f"1.{'reader' if norm else 'writer'}.{name}"]
        missed = (new - old - (block @ Q.T if norm else Q @ block)).norm() ** 2
        expected = float(1 - missed / (new - old).norm() ** 2)
        assert matrices[f"{name}.weight"]["captured_energy"] == pytest.approx(expected, rel=1e-4)
        assert recorded[f"{name}.weight"]["captured_energy"] == pytest.approx(expected, rel=1e-4)
        assert matrices[f"{name}.weight"]["rank"] == 8
    assert matrices["model.embed_tokens.weight"]["captured_energy"] == pytest.approx(1.0)
    assert row.holdings.strength == pytest.approx(1.0, abs=1e-3)
    assert "effective" in row.holdings.note


def test_energies_of_the_score_construction_are_of_the_plain_weights(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("gpt2")
    latte = adapt_convert.convert(pair.base, pair.ft, to="latte", rank=3, construction="score").save(tmp_path / "latte")
    matrices, written = run(pair, latte).candidates[0].to_json()["details"]["matrices"], load_file(latte / "latte.safetensors")
    base, ft = (load_file(path / "model.safetensors")["transformer.h.1.attn.c_attn.weight"].T for path in (pair.base, pair.ft))
    held = torch.cat([written[f"1.score.transformer.h.1.attn.{x}_B"] @ written[f"1.score.transformer.h.1.attn.{x}_A"] for x in "qkv"])
    expected = float(1 - (ft - base - held).norm() ** 2 / (ft - base).norm() ** 2)
    assert matrices["transformer.h.1.attn.c_attn.weight"]["captured_energy"] == pytest.approx(expected, rel=1e-4)
    assert matrices["transformer.h.1.mlp.c_fc.weight"]["captured_energy"] == 0.0


def test_tasks_of_a_bundle_and_a_damaged_one(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    loras = [
        adapt_convert.convert(pair.base, pair.ft, rank=rank, exclude=("lm_head", "embed_tokens")).save(tmp_path / f"lora{rank}")
        for rank in (2, 6)
    ]
    bundle = adapt_convert.bundle(pair.base, loras, rank=32).save(tmp_path / "bundle")
    alone = run(pair, *loras).candidates
    tasks = run(pair, bundle, tasks=("lora2", "lora6")).candidates
    for task, lora in zip(tasks, alone, strict=True):
        assert task.attribution.total == pytest.approx(task.attribution.measured, rel=2e-3)
        assert task.attribution.measured == pytest.approx(lora.attribution.measured, rel=1e-2)  # full width: the LoRA itself
    assert tasks[0].holdings.captured < tasks[1].holdings.captured
    latte = adapt_convert.convert(pair.base, pair.ft, to="latte", rank=16).save(tmp_path / "latte")
    tensors = load_file(latte / "latte.safetensors")
    save_file({key: value / 2 if "er.model" in key else value for key, value in tensors.items()}, latte / "latte.safetensors")
    assert any("not what was converted" in reason for reason in run(pair, latte).candidates[0].reasons)
