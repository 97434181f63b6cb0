"""Validating fine-tunes that know other tokens than their base: everyone runs as a user who enlarged the base would run it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibrating import token_file
from conftest import MODELS, save_pair
from safetensors.torch import load_file, save_file
from vocabulary import ADDED, load_as_the_card_says, with_tokens

import adapt_convert
from adapt_convert import AdaptError, validate
from adapt_convert.formats.validation_card import with_validation
from adapt_convert.formats.validation_html import validation_page

IDS = torch.randint(3, ADDED, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()  # old and new tokens


def run(*paths: Path, token_ids: Any = IDS, **options: Any) -> Any:
    return validate(*paths, token_ids=token_ids, **{"speed": False, **options})


def kl(reference: Any, model: Any, rows: list[list[int]] = IDS) -> float:
    """`KL(reference || model)` by PyTorch's `kl_div`; tokens that the reference does not know have no probability there."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p, q = (m(input_ids=torch.tensor(rows)).logits.double().log_softmax(-1) for m in (reference, model))
    return float(torch.nn.functional.kl_div(q[..., : p.shape[-1]], p, log_target=True, reduction="none").sum(-1).mean())


def misplaced(adapter: Path, out: Path) -> Path:
    """The adapter with its added rows in another order."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    for value in tensors.values():
        if len(value) == ADDED:
            value[96:] = value[96:].roll(1, 0)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("change", [True, False], ids=["all changed", "rows alone"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_a_whole_conversion_passes_and_a_wrong_one_fails(tmp_path: Path, name: str, change: bool) -> None:
    pair = with_tokens(tmp_path, name, change)
    full = adapt_convert.convert(pair.base, pair.ft, rank=64, dtype="float32").save(tmp_path / "full")
    wrong = misplaced(full, tmp_path / "wrong")
    result = run(pair.base, pair.ft, full, wrong)
    assert result.enlarged == (96, ADDED)
    right, other = result.candidates
    assert right.passed
    assert right.fidelity.kl < 1e-9
    assert right.holdings.captured == pytest.approx(1.0, abs=1e-6)
    assert right.attribution.note is None
    assert other.passed is False
    assert other.fidelity.kl > result.base.fidelity.kl / 2
    assert any("holds" in reason and "of its change, conversion.json says 100.0%" in reason for reason in other.reasons)


def test_the_figures_are_those_of_plain_transformers_and_peft(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path / "out")
    result = run(pair.base, pair.ft, out)
    base = pair.load(pair.base)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        base.resize_token_embeddings(ADDED)
        reference = pair.load(pair.ft)
        assert result.base.fidelity.kl == pytest.approx(kl(reference, base), rel=1e-5)
        model = peft.PeftModel.from_pretrained(base, out).eval()
    assert result.candidates[0].fidelity.kl == pytest.approx(kl(reference, model), rel=1e-5)


@pytest.mark.parametrize("to", ["lorta", "latte"])
def test_other_adapters_run_on_the_enlarged_base(tmp_path: Path, to: str) -> None:
    pair = with_tokens(tmp_path, "llama")
    out = adapt_convert.convert(pair.base, pair.ft, to=to, rank=32 if to == "latte" else 4).save(tmp_path / "out")
    found = run(pair.base, pair.ft, out).candidates[0]
    assert found.fidelity.kl < 1e-9 or to == "lorta"  # whose rank is small
    assert found.attribution.note is None


def test_an_adapter_without_the_tokens_is_judged_too(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama", change=True)
    out = adapt_convert.convert(pair.base, pair.ft, rank=32, exclude=("embed_tokens", "lm_head")).save(tmp_path / "out")
    merged = adapt_convert.convert(pair.base, pair.ft, rank=32, dtype="float32").save(tmp_path / "whole")
    adapt_convert.merge(pair.base, merged, tmp_path / "merged")
    without, whole = run(pair.base, pair.ft, out, tmp_path / "merged").candidates
    assert without.fidelity.recovered < 0.5
    assert whole.passed


def test_an_adapter_as_the_fine_tune_enlarges_the_base(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    full = adapt_convert.convert(pair.base, pair.ft, rank=64, dtype="float32").save(tmp_path / "full")
    result = run(pair.base, full, full, tmp_path / "ft")
    assert result.enlarged == (96, ADDED)
    assert [row.fidelity.kl < 1e-9 for row in result.candidates] == [True, True]


def test_the_report_says_so(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=4).save(tmp_path / "out")
    result = run(pair.base, pair.ft, out)
    data, said = result.to_json(), "The base has 96 tokens and ran enlarged to the fine-tune's 104"
    assert json.loads(json.dumps(data))["enlarged"] == [96, 104]
    assert said in validation_page(data)
    assert said in with_validation((out / "README.md").read_text(), data["candidates"][0], data, "out")
    other = save_pair(tmp_path / "same", *MODELS["llama"])
    plain = run(other.base, other.ft, other.base, token_ids=[[5] * 8, [7] * 8]).to_json()
    assert plain["enlarged"] is None
    assert "ran enlarged" not in validation_page(plain)


def test_tokens_that_only_the_base_has_get_no_probability(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, *MODELS["llama"])
    tuned = pair.load(pair.ft)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.resize_token_embeddings(88)
    tuned.save_pretrained(pair.ft)
    rows = torch.randint(3, 88, (4, 24)).tolist()
    full = adapt_convert.convert(pair.base, pair.ft, rank=64, dtype="float32").save(tmp_path / "full")
    result = run(pair.base, pair.ft, full, token_ids=rows)
    assert result.enlarged is None
    expected = kl(tuned.eval(), pair.load_peft(full), rows)  # what the eight tokens of the base still get
    assert expected > 0.01
    assert result.candidates[0].fidelity.kl == pytest.approx(expected, rel=1e-5)
    assert result.candidates[0].fidelity.max_logit_difference < 1e-4
    assert result.candidates[0].attribution.note is None


def test_a_merged_checkpoint_without_the_tokens_is_refused(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    with pytest.raises(AdaptError, match=r"base has a vocabulary of 96, .*ft one of 104: their outputs cannot be compared"):
        run(pair.base, pair.ft, pair.base)


def test_calibration_runs_on_the_enlarged_base(tmp_path: Path) -> None:
    pair = with_tokens(tmp_path, "llama")
    text = token_file(tmp_path / "ids.jsonl", vocabulary=ADDED)
    conversion = adapt_convert.convert(pair.base, pair.ft, rank=4, calib=str(text))
    about = conversion.report["calibration"]
    assert set(about["candidates"]) == {"data-free", "whitened"}
    assert max(about["candidates"].values()) < about["kl_of_base"]
    assert pair.logits(load_as_the_card_says(conversion.save(tmp_path / "out"))).shape[-1] == ADDED
