"""`validate` against plain `transformers` and `peft`, and against adapters that are broken on purpose."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.convert.validation.validate import validate
from adapt_convert.convert.validation.verdict import Thresholds
from adapt_convert.formats.errors import AdaptError

ROWS = 6
LENGTH = 24


def token_rows(vocabulary: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator).tolist()


def run(pair: Any, *candidates: Path, **options: Any) -> Any:
    return validate(pair.base, pair.ft, *candidates, **({"token_ids": token_rows(), "speed": False} | options))


@pytest.fixture(scope="module")
def lora(pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-4 LoRA of the Llama pair."""
    pair = pairs("llama")
    return adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path_factory.mktemp("validated") / "lora")


@torch.no_grad()
def plain(model: Any) -> tuple[torch.Tensor, float]:
    """Logits of all rows, float64, and perplexity as `transformers` itself computes the loss."""
    ids = torch.tensor(token_rows())
    output = model(input_ids=ids, labels=ids)
    return output.logits.double(), float(output.loss.exp())


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """By PyTorch's own `kl_div`, mean over positions."""
    return float(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())


def test_figures_equal_plain_transformers(pairs: Any, lora: Path) -> None:
    pair = pairs("llama")
    result = run(pair, lora)
    reference, ft_perplexity = plain(pair.load(pair.ft))
    for row, model in ((result.base, pair.load(pair.base)), (result.candidates[0], pair.load_peft(lora))):
        logits, perplexity = plain(model)
        figures = row.fidelity
        assert figures.kl == pytest.approx(kl(reference, logits), rel=1e-5)
        assert figures.top1 == pytest.approx(float((reference.argmax(-1) == logits.argmax(-1)).double().mean()))
        assert figures.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert figures.max_logit_difference == pytest.approx(float((reference - logits).abs().max()), rel=1e-4)
        assert figures.kl_ci95[0] < figures.kl < figures.kl_ci95[1]
    assert result.fine_tune_perplexity == pytest.approx(ft_perplexity, rel=1e-5)
    found = result.candidates[0].fidelity
    assert found.recovered == pytest.approx(1 - found.kl / result.base.fidelity.kl)
    assert 0 < found.recovered < 1


def test_hidden_states_and_matrices_equal_plain_hooks(pairs: Any, lora: Path) -> None:
    pair = pairs("llama")
    name = "model.layers.1.mlp.up_proj"
    seen: dict[str, Any] = {}
    for key, model in (("ft", pair.load(pair.ft)), ("base", pair.load(pair.base)), ("lora", pair.load_peft(lora))):
        module = (model.base_model.model if key == "lora" else model).get_submodule(name)
        outputs: list[torch.Tensor] = []
        module.register_forward_hook(lambda m, i, o, outputs=outputs: outputs.append(o))
        with torch.no_grad():
            seen[key] = model(input_ids=torch.tensor(token_rows()[:1]), output_hidden_states=True).hidden_states, outputs[0]
    found = run(pair, lora, token_ids=token_rows()[:1]).candidates[0]
    assert set(found.hidden_error) == {"0", "1", "2"}
    for layer in (0, 1, 2):
        a, b = seen["ft"][0][layer], seen["lora"][0][layer]
        assert found.hidden_error[str(layer)] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-3)
    error, of_base = ((seen[key][1] - seen["ft"][1]).norm() ** 2 for key in ("lora", "base"))
    assert found.output_recovered[name] == pytest.approx(float(1 - error / of_base), rel=1e-3)


def test_greedy_agreement_equals_generate(pairs: Any, lora: Path) -> None:
    pair = pairs("llama")
    found = run(pair, lora).candidates[0].greedy_agreement
    shares = []
    for row in token_rows():
        prompt = torch.tensor([row[: LENGTH // 2]])
        options = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": -1, "pad_token_id": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a, b = (m.generate(input_ids=prompt, **options)[0, LENGTH // 2 :] for m in (pair.load(pair.ft), pair.load_peft(lora)))
        same = (a == b).tolist()
        shares.append([*same, False].index(False) / 32)
    assert found == pytest.approx(sum(shares) / len(shares))


ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "gpt2", "bert", "roberta", "vit", "t5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fine_tune_itself_and_the_base_itself(pairs: Any, name: str) -> None:
    pair = pairs(name)
    options = {"token_ids": None} if name == "vit" else {}
    same, nothing = run(pair, pair.ft, pair.base, **options).candidates
    assert same.passed
    assert same.fidelity.kl < 1e-6
    assert same.fidelity.recovered == pytest.approx(1.0, abs=1e-6)
    assert same.fidelity.top1 == 1.0
    assert set(same.hidden_error.values()) == {0.0}
    assert nothing.passed is False
    assert nothing.fidelity.recovered == 0.0
    assert "not below the base's" in nothing.reasons[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_candidate_on_one_base(pairs: Any, tmp_path: Path, name: str) -> None:
    """Full rank is exact; in turn and in any order, so that one candidate left on the base would be seen in the next."""
    pair = pairs(name)
    options = {"token_ids": None} if name == "vit" else {}
    full = adapt_convert.convert(pair.base, pair.ft, rank=64, dtype="float32").save(tmp_path / "full")
    small = adapt_convert.convert(pair.base, pair.ft, rank=1).save(tmp_path / "small")
    lorta = adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=4).save(tmp_path / "lorta")
    adapt_convert.merge(pair.base, small, tmp_path / "merged")
    options |= {"thresholds": Thresholds(min_recovered=-1.0)}
    rows = run(pair, tmp_path / "merged", lorta, small, full, small, lorta, full, **options).candidates
    assert rows[3].passed
    # One or four ranks of a random change may not come nearer to the fine-tune; nothing else speaks against them.
    assert [reason for row in rows for reason in row.reasons if "not below the base's" not in reason] == []
    assert all(share.captured > 0.99 for share in rows[3].holdings.shares)  # under whatever name a shared value is stored
    merged, lorta_1, small_1, full_1, small_2, lorta_2, full_2 = (row.fidelity.kl for row in rows)
    assert full_1 < 1e-6
    assert full_1 == full_2
    assert small_1 == small_2
    assert lorta_1 == lorta_2
    assert merged == pytest.approx(small_1, rel=1e-3)
    assert small_1 > 1e-5
    assert [row.contender.kind for row in rows] == ["merged", "lorta", "lora", "lora", "lora", "lorta", "lora"]


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def halve(adapter: Path) -> None:
    change_config(adapter, lora_alpha=json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 2)


def swap_layers(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    turned = {key: key.replace(".layers.0.", ".layers.x.").replace(".layers.1.", ".layers.0.") for key in weights}
    save_file(
        {turned[key].replace(".layers.x.", ".layers.1."): value for key, value in weights.items()}, adapter / "adapter_model.safetensors"
    )


def switch_biases_off(adapter: Path) -> None:
    change_config(adapter, lora_bias=False)  # as mergekit leaves it: the tensors are there, and peft ignores them


def delete_biases(adapter: Path) -> None:
    switch_biases_off(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if not key.endswith(".bias")}, adapter / "adapter_model.safetensors")


def amplify(adapter: Path) -> None:
    change_config(adapter, lora_alpha=json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] * 1.3)


def change_factors(adapter: Path, part: str, change: Any) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    assert any(part in key for key in weights)
    changed = {key: change(value).contiguous() if part in key else value for key, value in weights.items()}
    save_file(changed, adapter / "adapter_model.safetensors")


def flip_rows(adapter: Path) -> None:
    change_factors(adapter, "q_proj.lora_B", lambda B: B.flip(0))


def zero_one(adapter: Path) -> None:
    change_factors(adapter, "layers.1.mlp.up_proj.lora_B", torch.zeros_like)


BROKEN = [
    (amplify, False, "1.30 times the strength that fits"),
    (flip_rows, False, "q_proj.weight away from the fine-tune"),
    (zero_one, False, "layers.1.mlp.up_proj.weight are all zero"),
    (halve, True, "not what was converted"),
    (halve, False, "of the strength that fits"),
    (swap_layers, True, "not what was converted"),
    (swap_layers, False, "away from the fine-tune"),
    (switch_biases_off, True, "peft ignores tensors"),
    (switch_biases_off, False, "peft ignores tensors"),
    (delete_biases, True, "not what was converted"),
]


@pytest.mark.parametrize(("damage", "with_record", "reason"), BROKEN)
def test_a_broken_adapter_fails_by_default(pairs: Any, tmp_path: Path, damage: Any, with_record: bool, reason: str) -> None:
    pair = pairs("qwen2")
    good = adapt_convert.convert(pair.base, pair.ft, rank=8).save(tmp_path / "good")
    shutil.copytree(good, tmp_path / "bad")
    damage(tmp_path / "bad")
    if not with_record:
        (tmp_path / "bad" / "conversion.json").unlink()
    whole, broken = run(pair, good, tmp_path / "bad").candidates
    assert whole.passed, whole.reasons
    assert broken.passed is False
    assert any(reason in line for line in broken.reasons), broken.reasons
    assert broken.fidelity.kl > whole.fidelity.kl


def scaled(path: Path, part: str, factor: float) -> None:
    weights = load_file(path)
    assert any(part in key for key in weights)
    save_file({key: value * factor if part in key else value for key, value in weights.items()}, path)


@pytest.mark.parametrize(("factor", "reason"), [(0.5, "at 1/2.00 of the strength"), (1.3, "1.30 times the strength")])
@pytest.mark.parametrize(
    ("target", "file", "part"), [("lorta", "adapter_model.safetensors", "C_l"), ("latte", "latte.safetensors", "er.model")]
)
def test_a_broken_lorta_or_latte_fails(pairs: Any, tmp_path: Path, target: str, file: str, part: str, factor: float, reason: str) -> None:
    pair = pairs("llama")
    good = adapt_convert.convert(pair.base, pair.ft, to=target, rank=12).save(tmp_path / "good")
    (good / "conversion.json").unlink()
    shutil.copytree(good, tmp_path / "bad")
    scaled(tmp_path / "bad" / file, part, factor)
    whole, broken = run(pair, good, tmp_path / "bad", thresholds=Thresholds(min_recovered=-1.0)).candidates
    assert whole.passed, whole.reasons
    assert any(reason in line for line in broken.reasons), broken.reasons


def test_candidates_that_cannot_run_leave_the_others_their_figures(pairs: Any, lora: Path, tmp_path: Path) -> None:
    pair = pairs("llama")
    for name in ("nan", "unknown", "merged"):
        shutil.copytree(pair.ft if name == "merged" else lora, tmp_path / name)
    change_factors(tmp_path / "nan", "layers.0.self_attn.q_proj.lora_B", lambda B: B * torch.nan)
    change_config(tmp_path / "unknown", peft_type="NOBODY_KNOWS")
    scaled(tmp_path / "merged" / "model.safetensors", "layers.0.self_attn.q_proj", torch.nan)
    result = run(pair, *(tmp_path / name for name in ("nan", "unknown", "merged")), lora)
    (alone,) = run(pair, lora).candidates
    nan, unknown, merged, good = result.candidates
    assert any("not finite" in reason for reason in nan.reasons)
    assert any("not finite" in reason for reason in merged.reasons)
    assert "fails on the key 'NOBODY_KNOWS'" in unknown.reasons[0]
    assert good.fidelity == alone.fidelity
    assert [row.passed for row in result.candidates] == [False, False, False, alone.passed]
    assert result.to_json()["candidates"][1]["kl"] is None


def test_peft_writing_over_the_base_is_undone(pairs: Any, tmp_path: Path) -> None:
    """peft loads a norm that is not in `modules_to_save` into the base itself; the next candidate must not see it."""
    pair = pairs("llama")
    good = adapt_convert.convert(pair.base, pair.ft, rank=2).save(tmp_path / "good")
    shutil.copytree(good, tmp_path / "odd")
    saved = json.loads((good / "adapter_config.json").read_text())["modules_to_save"]
    change_config(tmp_path / "odd", modules_to_save=[name for name in saved if "norm" not in name])
    (tmp_path / "odd" / "conversion.json").unlink()
    alone = run(pair, pair.base).base.fidelity.kl
    result = run(pair, tmp_path / "odd", good)
    after = run(pair, good, tmp_path / "odd")
    assert result.candidates[1].fidelity.kl == after.candidates[0].fidelity.kl
    assert result.base.fidelity.kl == alone
    assert result.candidates[0].fidelity.kl == pytest.approx(result.candidates[1].fidelity.kl)


@pytest.mark.parametrize("limits", [{"max_kl": 1e-9}, {"min_top1": 0.999}, {"min_recovered": 0.999}])
def test_each_threshold_fails_by_name(pairs: Any, lora: Path, limits: dict[str, float]) -> None:
    result = run(pairs("llama"), lora, thresholds=Thresholds(**limits))
    (name,) = limits
    assert not result.passed
    assert any(f"(--{name.replace('_', '-')})" in reason for reason in result.candidates[0].reasons)
    assert result.candidates[0].speed is None


def test_captured_energy_is_measured_without_a_record(pairs: Any, lora: Path, tmp_path: Path) -> None:
    shutil.copytree(lora, tmp_path / "bare")
    (tmp_path / "bare" / "conversion.json").unlink()
    said = json.loads((lora / "conversion.json").read_text())["tensors"]
    matrices = run(pairs("llama"), tmp_path / "bare").to_json()["candidates"][0]["details"]["matrices"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert matrices[name]["captured_energy"] == pytest.approx(said[name]["captured_energy"], abs=1e-4)
    assert matrices[name]["rank"] == 4


def test_latte_and_its_bundles(pairs: Any, tmp_path: Path) -> None:
    """A LatTE by itself, and as one task of a bundle, gives the function that `adapt_convert.load` gives it."""
    pair = pairs("llama")
    single = adapt_convert.convert(pair.base, pair.ft, to="latte", rank=16).save(tmp_path / "single")
    loras = [adapt_convert.convert(pair.base, pair.ft, rank=rank, exclude=("lm_head", "embed_tokens")) for rank in (2, 3)]
    paths = [lora.save(tmp_path / f"lora{number}") for number, lora in enumerate(loras)]
    bundle = adapt_convert.bundle(pair.base, paths, to="latte", rank=32).save(tmp_path / "bundle")
    with pytest.raises(AdaptError, match=r"is a bundle of lora0, lora1; say with --tasks"):
        run(pair, bundle)
    with pytest.raises(AdaptError, match=r"--tasks other"):
        run(pair, bundle, tasks=("other",))
    alone, *tasks = run(pair, single, bundle, tasks=("lora0", "2")).candidates
    assert [row.contender.task for row in (alone, *tasks)] == [None, "lora0", "2"]
    assert [row.contender.task for row in run(pair, bundle, tasks=("1", "lora0", "1")).candidates] == ["1"]
    reference, ids = plain(pair.load(pair.ft))[0], torch.tensor(token_rows())
    model = adapt_convert.load(pair.load(pair.base), single)
    with torch.no_grad():
        assert alone.fidelity.kl == pytest.approx(kl(reference, model(input_ids=ids).logits.double()), rel=1e-4)
    model = adapt_convert.load(pair.load(pair.base), bundle)
    for number, row in enumerate(tasks, 1):
        with torch.no_grad(), adapt_convert.task_ids(model, [number] * ROWS):
            assert row.fidelity.kl == pytest.approx(kl(reference, model(input_ids=ids).logits.double()), rel=1e-4)
    assert tasks[0].fidelity.kl != tasks[1].fidelity.kl
