"""Calibration: moments against transformers' own activations, whitened solvers against torch.linalg, and what is never made worse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import kl, plant, token_file
from click.testing import CliRunner
from conftest import Pair

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.calibration import moments as moments_file
from adapt_convert.convert.calibration.activations import captured_inputs
from adapt_convert.convert.calibration.calibrated import Candidate, _nearest
from adapt_convert.convert.calibration.judge import Figures, Judge
from adapt_convert.convert.calibration.least_squares import conjugate_gradients
from adapt_convert.convert.calibration.moments import Moments
from adapt_convert.convert.options import Options
from adapt_convert.convert.validation.outputs import Batch
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.lorta import LortaAdapter

KEPT = "embed_tokens,lm_head,wte,input_layernorm,post_attention_layernorm,norm"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapt-convert"


def convert(pair: Pair, text: Path | str, **options: Any) -> Any:
    given = {"rank": 4, "exclude": KEPT, "calib": text, "calib_tokens": 900, "dtype": "float32"} | options
    return adapt_convert.convert(pair.base, pair.ft, **given)


def stored_moments(cache: Path) -> Moments:
    (directory,) = (cache / "moments").iterdir()
    return Moments(directory, json.loads((directory / "index.json").read_text()))


def used_rows(text: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["input_ids"] for line in text.read_text().splitlines()])


def test_moments_are_those_of_the_fine_tunes_own_inputs(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    convert(pair, text)
    found = stored_moments(own_cache)
    rows = used_rows(text)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: 900 // rows.shape[1]]
    held_out = int(900 // rows.shape[1] * rows.shape[1] // 8 // rows.shape[1])
    model: Any = pair.load(pair.ft)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(rows[order[held_out:]])).flatten(0, 1)
    C = found.of("model.layers.0.self_attn.q_proj")
    expected = x.T @ x / len(x)
    expected.diagonal().add_(moments_file._RIDGE * expected.diagonal().mean())
    torch.testing.assert_close(C, expected, rtol=1e-4, atol=1e-6)
    assert found.name("model.layers.0.self_attn.k_proj") == found.name("model.layers.0.self_attn.q_proj")


def test_whitened_lora_is_the_svd_of_the_delta_times_the_root_of_the_moments(
    pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    judged = watched(monkeypatch)
    convert(pair, text)
    moments = stored_moments(own_cache)
    base, ft = (dict(pair.load(path).named_parameters()) for path in (pair.base, pair.ft))
    for module, factors in judged["whitened"].factors.items():
        D = (ft[f"{module}.weight"] - base[f"{module}.weight"]).detach().double()
        values, vectors = torch.linalg.eigh(moments.of(module).double())
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        U, S, V = torch.linalg.svd(D @ root)
        best = U[:, :4] * S[:4] @ V[:4] @ torch.linalg.inv(root)
        torch.testing.assert_close((factors.B @ factors.A).double(), best, rtol=1e-3, atol=1e-5)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every adapter that is measured from now on, by its name among the candidates."""
    judged: dict[str, Any] = {}
    measure = Judge.figures

    def keep(self: Judge, adapter: Any, name: str) -> Figures:
        judged[name] = adapter
        return measure(self, adapter, name)

    monkeypatch.setattr(Judge, "figures", keep)
    return judged


@pytest.mark.parametrize("to", ["lorta", "latte"])
def test_whitened_solvers_err_less_on_real_inputs(
    to: str, pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    judged = watched(monkeypatch)
    convert(pair, text, to=to, target_modules="all-linear")
    moments = stored_moments(own_cache)
    before, after = (sum(output_errors(pair, judged[name], moments)) for name in ("data-free", "whitened"))
    assert after < 0.99 * before


def output_errors(pair: Pair, adapter: Any, moments: Moments) -> Iterator[float]:
    """`E||(D - D~) x||^2` of every matrix, straight from the checkpoints, the adapter and the moments."""
    base, ft = (pair.load(path).state_dict() for path in (pair.base, pair.ft))

    def error(missed: torch.Tensor, site: str) -> float:
        return float((missed @ moments.of(site) * missed).sum())

    if isinstance(adapter, LortaAdapter):
        for block in adapter.blocks:
            for slot in block.slots:
                approximation = block.delta(slot)
                yield error(ft[f"{slot.module}.weight"] - base[f"{slot.module}.weight"] - approximation.B @ approximation.A, slot.module)
        return
    Q, task = adapter.segments[0].Q, adapter.tasks[0]
    for module, block in task.readers.items():
        layer = module.partition(".self_attn")[0].partition(".mlp")[0]
        norm = f"{layer}.{'input' if 'self_attn' in module else 'post_attention'}_layernorm"
        effective = [weights[f"{module}.weight"] * base[f"{norm}.weight"] for weights in (ft, base)]
        yield error(effective[0] - effective[1] - block @ Q.T, norm)
    for module, block in task.writers.items():
        yield error(ft[f"{module}.weight"] - base[f"{module}.weight"] - Q @ block, module)


def test_conjugate_gradients_solve_what_torch_solves() -> None:
    torch.manual_seed(0)
    root, target = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    system = root @ root.T + torch.eye(12)
    found = conjugate_gradients(lambda X: system @ X, target, torch.zeros_like(target), 40)
    torch.testing.assert_close(found, torch.linalg.solve(system, target))


@pytest.mark.parametrize(
    ("to", "rank", "only"),
    [("lora", 3, ("proj",)), ("latte", 6, ("q_proj", "o_proj")), ("lorta", 2, ("layers.0.self_attn.q_proj",))],
)
def test_a_planted_change_of_low_rank_stays_exact(
    to: str, rank: int, only: tuple[str, ...], make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    planted = 1 if to == "lorta" else 3
    pair = make_pair(tmp_path, "llama", lambda model: plant(model, planted, only))
    rank = {"lora": 3, "latte": 32, "lorta": 8}[to]
    conversion = convert(pair, token_file(tmp_path / "ids.jsonl"), to=to, rank=rank, refine=3)
    about = conversion.report["calibration"]
    assert conversion.report["captured_energy"] > 1 - 1e-5
    assert about["kl"] <= 1e-5
    assert set(about["candidates"]) == {"data-free", "whitened", "refined"}
    assert all(value <= 1e-5 for name, value in about["candidates"].items())


@pytest.mark.parametrize("to", ["lora", "lorta", "latte"])
def test_what_is_written_is_never_worse_than_without_text(to: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """The choice is made on rows held out, where the written one is never worse than the data-free one, by the figures of the report."""
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl", seed=1)
    about = convert(pair, text, to=to).report["calibration"]
    assert about["kl"] == about["candidates"][about["chosen"]] <= about["candidates"]["data-free"]
    assert about["kl_of_base"] > 0


@pytest.mark.parametrize("to", ["lora", "lorta", "latte"])
def test_unrelated_text_costs_at_most_a_tenth(to: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Calibrated on rows of one kind, measured on rows of another, with torch's own KL."""
    pair = pairs("llama")
    unrelated = tmp_path / "unrelated.jsonl"
    unrelated.write_text("\n".join(json.dumps({"input_ids": [3 + k % 5] * 20}) for k in range(40)))
    rows = used_rows(token_file(tmp_path / "ids.jsonl", seed=2))
    reference, found = pair.load(pair.ft), {}
    for name, options in (("free", {"calib": None}), ("calibrated", {"calib": unrelated})):
        convert(pair, unrelated, to=to, **options).save(tmp_path / name)
        model = pair.load_peft(tmp_path / name) if to == "lora" else adapt_convert.load(pair.load(pair.base), tmp_path / name)
        found[name] = kl(reference, model, rows)
    assert found["calibrated"] <= 1.1 * found["free"]


def test_text_of_the_fine_tune_s_own_is_told_from_other_text(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """By transformers' own loss: what the fine-tune samples it predicts better than the base does, what the base samples worse."""
    pair = pairs("llama")
    models = {"ft": pair.load(pair.ft), "base": pair.load(pair.base)}
    for writer, expected in (("ft", True), ("base", False)):
        torch.manual_seed(3)
        start = torch.randint(3, 96, (160, 1))
        rows = models[writer].generate(start, do_sample=True, min_new_tokens=23, max_new_tokens=23, top_k=0, pad_token_id=0)
        text = tmp_path / f"{writer}.jsonl"
        text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows.tolist()))
        about = convert(pair, text, calib_tokens=4000).report["calibration"]
        assert about["in_domain"] is expected
        loss = {name: float(model(input_ids=rows, labels=rows).loss.detach()) for name, model in models.items()}
        assert (loss["ft"] < loss["base"]) is expected


def test_what_gains_on_the_text_alone_is_chosen_only_where_the_text_is_the_fine_tune_s() -> None:
    free = Candidate("data-free", None, [], Figures(0.4, 0.1))
    fitted = Candidate("refined", None, [], Figures(0.2, 0.11))
    assert _nearest([free, fitted], in_domain=False) is free
    assert _nearest([free, fitted], in_domain=True) is fitted


def test_a_second_conversion_reuses_the_moments(pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    first = convert(pair, text)

    def refuse(*_: object) -> None:
        raise AssertionError("the moments were worked out again")

    monkeypatch.setattr(moments_file, "captured_inputs", refuse)
    second = convert(pair, text)
    assert second.report["calibration"] == first.report["calibration"]
    with pytest.raises(AssertionError):
        convert(pair, token_file(tmp_path / "other.jsonl", seed=5))


def test_damaged_moments_are_worked_out_again(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    first = convert(pair, text).report["calibration"]
    for file in own_cache.rglob("*q_proj.safetensors"):
        file.write_bytes(b"cut off")
    assert convert(pair, text).report["calibration"] == first


@pytest.mark.parametrize(("to", "enough"), [("lora", 3), ("lorta", 3), ("latte", 12), ("loda", 3)])
def test_target_kl_finds_the_least_rank(to: str, enough: int, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    by_rank = {rank: convert(pair, text, rank=rank, to=to).report["calibration"]["kl"] for rank in (2, enough)}
    target = (by_rank[2] + by_rank[enough]) / 2
    conversion = convert(pair, text, rank=None, target_kl=target, to=to)
    about = conversion.report["calibration"]
    (found,) = {record.rank for record in conversion.records if record.status == "factored" and record.rank}
    assert about["kl"] == about["searched"][str(found)] <= target < about["searched"][str(found - 1)]
    assert 2 < found <= enough
    assert about["searched"]["2"] == by_rank[2]
    if found == enough:
        assert about["kl"] == by_rank[enough]


def test_budget_as_a_share_of_the_base(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    size = sum(tensor.nbytes for tensor in pair.load(pair.base).state_dict().values())
    conversion = adapt_convert.convert(pair.base, pair.ft, budget="10%", exclude=KEPT)
    written = sum(factors.A.nbytes + factors.B.nbytes for factors in conversion.adapter.factors.values())
    assert 0.08 * size < written <= 0.1 * size
    assert conversion.report["options"]["budget"] == int(0.1 * size)
    assert Options(budget="0.1%").size_name == "0.1pct"


def test_a_calibrated_budget_is_spent_by_the_energy_of_outputs(
    pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the ranks that a greedy choice over numpy's singular values of `D L` gives."""
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    budget = 12_000
    judged = watched(monkeypatch)
    convert(pair, text, rank=None, budget=budget)
    moments = stored_moments(own_cache)
    base, ft = (pair.load(path).state_dict() for path in (pair.base, pair.ft))
    offers = []
    for name, value in base.items():
        if "proj" in name:
            L = np.linalg.cholesky(moments.of(name.removesuffix(".weight")).double().numpy())
            energies = np.linalg.svd((ft[name] - value).double().numpy() @ L, compute_uv=False) ** 2
            offers += [(energy / sum(value.shape), 4 * sum(value.shape), name.removesuffix(".weight")) for energy in energies]
    ranks, left = dict[str, int](), budget
    for _, cost, module in sorted(offers, reverse=True):
        if cost > left:
            break
        ranks[module], left = ranks.get(module, 0) + 1, left - cost
    found = {module: factors.rank for module, factors in judged["whitened"].factors.items()}
    assert sum(abs(found.get(m, 0) - ranks.get(m, 0)) for m in {*found, *ranks}) <= 1  # what is left of the budget may buy one more


def test_a_calibrated_budget_in_half_precision_is_spent_whole(
    pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whitened solver works in float32, whose factors are twice as large as those that are written."""
    judged = watched(monkeypatch)
    convert(pairs("llama"), token_file(tmp_path / "ids.jsonl"), rank=None, budget=9000, dtype="bfloat16")
    sizes = [sum(f.A.nbytes + f.B.nbytes for f in judged[name].factors.values()) for name in ("data-free", "whitened")]
    assert all(8500 < size <= 9000 for size in sizes)


def test_the_fine_tune_writes_its_own_text(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("llama-tied")
    first, second = (convert(pair, "self", calib_tokens=256, seed=seed).report["calibration"] for seed in (0, 0))
    assert first == second
    assert first["text"] == "written by the fine-tune (seed 0)"
    assert first["tokens"] + first["heldout_tokens"] == 256


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"refine": 3}, "--refine runs the models on text: give --calib FILE, or --calib self"),
        ({"target_kl": 0.1}, "--target-kl runs the models on text"),
        ({"target_kl": 0.1, "rank": 3, "calib": "self"}, "--rank and --target-kl contradict each other"),
        ({"target_kl": 0, "calib": "self"}, "--target-kl 0.0: must be above 0"),
        ({"refine": 0, "calib": "self"}, "--refine 0: must be a whole number of at least 1"),
        ({"calib": ""}, "--calib: name a file"),
        ({"calib": "self", "calib_tokens": 3}, "--calib-tokens 3: must be at least 64"),
        ({"budget": "0%"}, "--budget 0%: must be at least one byte"),
        ({"budget": "100%"}, "--budget 100%: must be at least one byte, or a share"),
        ({"budget": "x%"}, "--budget x%: must be at least one byte, or a share"),
        ({"budget": float("inf")}, "--budget inf: must be"),
        ({"to": "latte", "construction": "score", "calib": "self"}, "--calib works for --construction residual"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], line: str) -> None:
    with pytest.raises(AdaptError, match=line):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("missing.txt", None, "missing.txt: cannot be read"),
        ("", None, "cannot be read: Is a directory"),
        ("nothing.txt", "", "nothing.txt: is empty"),
        ("empty.txt", "  \n", "empty.txt: holds no text"),
        ("short.jsonl", '{"input_ids": [5]}', "short.jsonl: has 1 tokens"),
        ("wrong.jsonl", '{"input_ids": [5, 900, 6]}', "wrong.jsonl: holds token 900, but the model knows 96 tokens"),
        ("text.txt", "a few words", "no tokenizer in it; put one there, or give --calib F.jsonl"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(
    name: str, content: str | None, line: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, path = pairs("llama"), tmp_path / name
    if content is not None:
        path.write_text(content)
    arguments = ["delta", str(pair.base), str(pair.ft), "--calib", str(path), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert line in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, ""])
def test_missing_text_is_found_before_anything_is_opened(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    for run in (adapt_convert.convert, adapt_convert.plan, adapt_convert.inspect):
        with pytest.raises(AdaptError, match=f"^--calib {path}: "):
            run(tmp_path / "no base", tmp_path / "no source", calib=path)


def test_a_budget_as_a_float_of_one_or_more_is_bytes() -> None:
    assert [Options(budget=given).budget for given in (2e7, 1.0, 0.001, "0.1%")] == [20_000_000, 1, 0.001, 0.001]


def test_target_kl_that_no_rank_reaches(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """All weights change, and the factored matrices are a part of them."""
    pair = make_pair(tmp_path, "llama")
    text = token_file(tmp_path / "ids.jsonl")
    with pytest.raises(AdaptError, match=r"--target-kl 1e-06: rank 16, the largest, leaves 0\.\d+ on held-out text"):
        convert(pair, text, rank=None, target_kl=1e-6, target_modules="v_proj")


def test_models_of_images_are_refused(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("vit")
    with pytest.raises(AdaptError, match="reads images, and calibration is on text"):
        adapt_convert.convert(pair.base, pair.ft, calib=token_file(tmp_path / "ids.jsonl"))


def test_the_command_says_what_was_chosen_and_by_how_much(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    options = ["--rank", "4", "--exclude", KEPT, "--calib", str(text), "--calib-tokens", "900"]
    result = CliRunner().invoke(main, ["delta", str(pair.base), str(pair.ft), *options, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    about = json.loads((tmp_path / "out" / "conversion.json").read_text())["calibration"]
    for name, value in about["candidates"].items():
        assert f"{name} {value:.4g}" in " ".join(result.stdout.split())
    assert about["chosen"] in result.stdout
    assert math.isfinite(about["kl"])


def test_a_matrix_that_takes_no_part_is_one_line(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("llama")
    model: Any = pair.load(pair.ft)
    model.idle = torch.nn.Linear(4, 4)
    batch = Batch({"input_ids": pair.inputs["input_ids"]}, None, None)
    for name, line in (("idle", "idle: takes no part when the model runs"), ("gone", "gone: is no module of the model")):
        with pytest.raises(AdaptError, match=f"{line}.*--exclude"):
            list(captured_inputs(model, ["model.layers.0.self_attn.q_proj", name], [batch], torch.device("cpu")))


def test_changed_options_still_know_that_no_rank_was_asked_for() -> None:
    """A LoRA keeps its rank then, also where the whitened solver changes an option."""
    assert Options().changed(dtype="float32").keeps(20)
    assert not Options(rank=16).changed(dtype="float32").keeps(20)
