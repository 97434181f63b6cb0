"""Bundles: rows of several tasks in one batch, each row what its own task gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_convert
from adapt_convert.convert.latte.bundle import bundle
from adapt_convert.formats.errors import AdaptError

from .test_latte import CASES, Planted, batch, logits, plant, save_planted

TASKS = 8


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planted]:
    made: dict[str, Planted] = {}

    def make(name: str) -> Planted:
        if name not in made:
            case = save_planted(tmp_path_factory.mktemp(name), name, tasks=TASKS)
            sources = [case.directory / f"ft{task}" for task in range(1, TASKS + 1)]
            bundle(case.directory / "base", sources, rank=case.Q.shape[1]).save(case.directory / "bundle")
            made[name] = case
        return made[name]

    return make


def alone(case: Planted, task: int) -> Any:
    return case.model(f"ft{task}" if task else "base")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "opt"])
def test_every_row_of_a_mixed_batch_equals_its_own_model(name: str, bundled: Callable[[str], Planted]) -> None:
    case = bundled(name)
    ids = [3, 0, 8, 1, 5, 0, 2, 7, 4, 6]
    inputs = batch(rows=len(ids))
    model = adapt_convert.load(case.model(), case.directory / "bundle")
    generation = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with adapt_convert.task_ids(model, ids), torch.no_grad():
        mixed = model(**inputs).logits
        written = model.generate(**inputs, **generation)
    for row, task in enumerate(ids):
        own, one = alone(case, task), {key: value[row : row + 1] for key, value in inputs.items()}
        real = one["attention_mask"][0].bool()
        torch.testing.assert_close(mixed[row][real], logits(own, one), atol=1e-4, rtol=0)
        assert torch.equal(written[row], own.generate(**one, **generation)[0])


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_rows_of_post_norm_encoders_have_their_own_norms_too(name: str, bundled: Callable[[str], Planted]) -> None:
    case, ids = bundled(name), [3, 0, 8, 1]
    inputs = batch(rows=len(ids))
    model = adapt_convert.load(case.model(), case.directory / "bundle")
    with adapt_convert.task_ids(model, ids), torch.no_grad():
        mixed = model(**inputs).logits
    for row, task in enumerate(ids):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(mixed[row][one["attention_mask"][0].bool()], logits(alone(case, task), one), atol=1e-4, rtol=0)


def test_rows_of_task_0_are_the_base_and_so_is_a_bundle_without_task_ids(bundled: Callable[[str], Planted]) -> None:
    case, inputs = bundled("llama"), batch()
    expected = logits(case.model(), inputs)
    model = adapt_convert.load(case.model(), case.directory / "bundle")
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    with adapt_convert.task_ids(model, [0, 0, 0]):
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    with adapt_convert.task_ids(model, [1, 1, 1]):
        assert (logits(model, inputs) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen3", "llama", "opt"])  # without and with biases, and with rows flattened before the MLP
def test_a_single_adapter_takes_task_ids_too(name: str, bundled: Callable[[str], Planted], tmp_path: Path) -> None:
    case, inputs = bundled(name), batch()
    adapt_convert.convert(case.directory / "base", case.directory / "ft1", to="latte", rank=6).save(tmp_path / "latte")
    model = adapt_convert.load(case.model(), tmp_path / "latte")
    base, tuned = case.model(), case.model("ft1")
    first = inputs["attention_mask"].sum(1)[0]
    with adapt_convert.task_ids(model, [0, 1, 1]):
        mixed = logits(model, inputs)
    torch.testing.assert_close(mixed[:first], logits(base, inputs)[:first], atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[first:], logits(tuned, inputs)[first:], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, inputs), logits(tuned, inputs), atol=1e-4, rtol=0)


def test_bundles_in_segments_and_unloading(bundled: Callable[[str], Planted], tmp_path: Path) -> None:
    case, inputs = bundled("llama"), batch()
    bundle(case.directory / "base", [case.directory / "ft1", case.directory / "ft2"], rank=6, segments=3).save(tmp_path / "b")
    model = case.model()
    expected = logits(model, inputs)
    adapt_convert.load(model, tmp_path / "b")
    with adapt_convert.task_ids(model, [2, 2, 2]):
        torch.testing.assert_close(logits(model, inputs), logits(case.model("ft2"), inputs), atol=1e-4, rtol=0)
    adapt_convert.unload(model)
    assert torch.equal(logits(model, inputs), expected)


def test_a_small_task_is_not_drowned_by_a_large_one(tmp_path: Path) -> None:
    """Task 2 changes a thousandth as much in a subspace of its own; a basis of both ranks holds both."""
    case = save_planted(tmp_path, "llama", rank=2)
    small = case.model()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    other = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(9))).Q
    for key, value in before.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            small.state_dict()[key].copy_(value + 1e-3 * other @ torch.randn(2, value.shape[1]))
    small.save_pretrained(tmp_path / "small")
    conversion = bundle(tmp_path / "base", [tmp_path / "ft1", tmp_path / "small"], rank=4)
    assert conversion.report["tasks"]["ft1"] > 0.9999
    assert conversion.report["tasks"]["small"] > 0.9999
    narrow = bundle(tmp_path / "base", [tmp_path / "ft1", tmp_path / "small"], rank=2)
    assert min(narrow.report["tasks"].values()) > 0.2  # two dims, shared: neither task gets both


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 9, 1], r"task_ids: 9 is out of range; there are 8 tasks, 1 to 8, and 0 is the base"),
        ([-1], r"task_ids: -1 is out of range"),
        ([], r"task_ids: no row is given"),
        ([1, 2], r"task_ids names 2 rows, the batch has 3"),
        ([1], r"task_ids names 1 rows, the batch has 3"),
        ([[0, 1, 2]], r"task_ids: \[\[0, 1, 2\]\] is no list of whole numbers"),
        ("012", r"task_ids: '012' is no list of whole numbers"),
        (3, r"task_ids: 3 is no list of whole numbers"),
        ([1.5, 0, 0], r"task_ids: \[1\.5, 0, 0\] is no list of whole numbers"),
    ],
)
def test_task_ids_out_of_range_are_refused(ids: Any, message: str, bundled: Callable[[str], Planted]) -> None:
    case = bundled("llama")
    model = adapt_convert.load(case.model(), case.directory / "bundle")
    with pytest.raises(AdaptError, match=message), adapt_convert.task_ids(model, ids):
        model(**batch())


def test_a_bundle_refuses_a_source_that_is_the_base(tmp_path: Path) -> None:
    case = save_planted(tmp_path, "llama")
    with pytest.raises(AdaptError, match=r"base: none of the targeted matrices changed; leave it out, as rows of task 0 are the base"):
        bundle(tmp_path / "base", [tmp_path / "ft1", case.directory / "base"], rank=6)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_rows_of_task_0_are_the_base_in_bfloat16_too(name: str, bundled: Callable[[str], Planted]) -> None:
    """The same operations as the base's, so that nothing but the shape of the products differs."""
    case, inputs = bundled(name), batch()
    expected = logits(case.model(dtype=torch.bfloat16), inputs)
    model = adapt_convert.load(case.model(dtype=torch.bfloat16), case.directory / "bundle")
    with adapt_convert.task_ids(model, torch.tensor([0, 0, 0])):
        torch.testing.assert_close(logits(model, inputs), expected, atol=2**-6 * float(expected.abs().max()), rtol=0)


def test_task_ids_need_a_latte(bundled: Callable[[str], Planted]) -> None:
    with pytest.raises(AdaptError, match="carries no adapters to choose from"), adapt_convert.task_ids(bundled("llama").model(), [0]):
        pass


def test_what_rows_cannot_have_for_themselves_is_refused_or_left_out(tmp_path: Path) -> None:
    case = save_planted(tmp_path, "llama")
    tuned = case.model("ft1")
    tuned.lm_head.weight.data += 0.1
    tuned.save_pretrained(tmp_path / "ft2")
    sources = [tmp_path / "ft1", tmp_path / "ft2"]
    with pytest.raises(AdaptError, match=r"changes lm_head\.weight, which all rows of a batch share; leave out with --exclude lm_head"):
        bundle(tmp_path / "base", sources, rank=6)
    report = bundle(tmp_path / "base", sources, rank=6, exclude=("lm_head",)).report
    assert report["tensors"]["ft2: lm_head.weight"]["status"] == "dropped"


_LAYER = r"model\.layers\.0"
_REFUSED = {
    "latte": (r"lm_head\.weight and model\.embed_tokens\.weight", "lm_head,embed_tokens"),
    "shared-lora": (
        rf"model\.embed_tokens\.weight, {_LAYER}\.input_layernorm\.weight, {_LAYER}\.post_attention_layernorm\.weight and 3 more",
        "embed_tokens,input_layernorm,post_attention_layernorm,norm",
    ),
}


def test_advice_that_costs_matrices_says_so(pairs: Any) -> None:
    pair = pairs("qwen2")
    said = r"the matrices of k_proj, q_proj, v_proj go with their biases, which a shared LoRA cannot hold; --to latte folds them"
    with pytest.raises(AdaptError, match=rf"leave out with --exclude \S+ \({said}\), or convert"):
        adapt_convert.bundle(pair.base, [pair.ft], to="shared-lora", rank=4)


@pytest.mark.parametrize("to", _REFUSED)
def test_one_refusal_names_all_that_rows_share_and_its_advice_mends_it(to: str, make_pair: Any, tmp_path: Path) -> None:
    """Every parameter of `ft` changed; `other` changed its embedding beside a matrix."""
    changed, exclude = _REFUSED[to]
    pair = make_pair(tmp_path, "llama")
    other = pair.load(pair.base)
    for parameter in (other.model.embed_tokens.weight, other.model.layers[0].mlp.down_proj.weight):
        parameter.data += 0.1
    other.save_pretrained(tmp_path / "other")
    sources = [pair.ft, tmp_path / "other"]
    advice = f"which all rows of a batch share; leave out with --exclude {exclude}, or convert"
    with pytest.raises(AdaptError, match=rf"ft and 1 more of the sources: change {changed}, {advice} these one by one"):
        adapt_convert.bundle(pair.base, sources, to=to, rank=4)
    with pytest.raises(AdaptError, match=rf"ft: changes {changed}, {advice} this one on its own"):
        adapt_convert.bundle(pair.base, sources[:1], to=to, rank=4)
    given, _, missing = exclude.partition(",")
    with pytest.raises(AdaptError, match=rf"share; leave out with --exclude {given},{missing}, or"):
        adapt_convert.bundle(pair.base, sources, to=to, rank=4, exclude=given)
    assert set(adapt_convert.bundle(pair.base, sources, to=to, rank=4, exclude=exclude).report["tasks"]) == {"ft", "other"}


def test_planting_changes_with_the_seed() -> None:
    """The tasks of the fixture differ, or the tests above would prove nothing."""
    model_class, config = CASES["llama"]
    models = [model_class(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for seed, model in enumerate(models):
        plant(model, torch.linalg.qr(torch.randn(32, 6)).Q if seed else torch.eye(32)[:, :6], seed)
    first, second = (m.model.layers[0].mlp.down_proj.weight for m in models)
    assert (first - second).abs().max() > 0.01
