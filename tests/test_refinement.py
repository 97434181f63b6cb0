"""Refinement: it lowers the KL by transformers' and torch's own measure, never writes something worse, and goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import KEPT, files_of_at_most, kl, token_file
from conftest import Pair, save_pair
from families import tiny
from transformers import RwkvConfig, RwkvForCausalLM

import adapt_convert
from adapt_convert.convert.calibration import teacher
from adapt_convert.convert.calibration.cache import written
from adapt_convert.convert.calibration.remeasure import remeasured
from adapt_convert.convert.calibration.teacher import divergence, targets_of
from adapt_convert.convert.opening import open_source
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.refinement.trainable import RECIPES
from adapt_convert.convert.refinement.training import Lesson, Trainable, distil
from adapt_convert.convert.validation.candidates import Stage, open_contender
from adapt_convert.convert.validation.outputs import Batch, predictions_of
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import read_latte
from adapt_convert.formats.location import locate
from adapt_convert.terminal import print_summary

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")


def convert(pair: Pair, text: Path, **options: Any) -> Any:
    given = {"rank": 4, "exclude": KEPT, "calib": text, "calib_tokens": 900, "refine": 8, "dtype": "float32"} | options
    return adapt_convert.convert(pair.base, pair.ft, **given)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"to": "lora"}),
        ("llama-tied", {"to": "lora", "target_modules": "all-linear,embed_tokens", "exclude": "norm"}),
        ("gpt2", {"to": "lora"}),
        ("llama", {"to": "lorta", "target_modules": "all-linear"}),
        ("gpt2", {"to": "lorta"}),
        ("llama", {"to": "latte", "segments": 2}),
        ("bert", {"to": "latte", "exclude": "word_embeddings"}),
    ],
)
def test_refined_adapters_are_nearer_to_the_fine_tune(
    name: str, options: dict[str, Any], pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """What was written is loaded by peft, or by our run-time modules, and measured on rows of its own."""
    pair, text = pairs(name), token_file(tmp_path / "ids.jsonl", skew=0)  # what a model of random weights writes looks like that
    new = token_file(tmp_path / "new.jsonl", seed=9, skew=0)
    rows = torch.tensor([json.loads(line)["input_ids"] for line in new.read_text().splitlines()])
    reference, found = pair.load(pair.ft), {}
    for name, calibration in (("free", {}), ("refined", {"calib": text, "calib_tokens": 1800, "refine": 6})):
        given = {"rank": 4, "exclude": KEPT, "dtype": "float32"} | options | calibration
        output = adapt_convert.convert(pair.base, pair.ft, **given).save(tmp_path / name)
        model = pair.load_peft(output) if options["to"] == "lora" else adapt_convert.load(pair.load(pair.base), output)
        found[name] = kl(reference, model, rows)
    assert found["refined"] < 0.995 * found["free"]


def test_the_report_says_what_was_measured_on_what_was_written(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    conversion = convert(pair, text, dtype="bfloat16")
    output, about = conversion.save(tmp_path / "out"), conversion.report["calibration"]
    lines = [json.loads(line)["input_ids"] for line in text.read_text().splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    held_out = torch.tensor(lines)[order[: about["heldout_tokens"] // len(lines[0])]]
    assert about["chosen"] == "refined"
    assert about["kl"] == pytest.approx(kl(pair.load(pair.ft), pair.load_peft(output), held_out), rel=1e-4)
    assert about["kl"] < min(value for name, value in about["candidates"].items() if name != "refined")
    best = {record.entry.module: record.captured for record in conversion.records if record.status == "factored"}
    merged = adapt_convert.convert(pair.base, output, rank=4)  # the energies as another reader of the file sees them
    base, ft = (pair.load(path).state_dict() for path in (pair.base, pair.ft))
    for module, factors in merged.adapter.factors.items():
        delta, held = ft[f"{module}.weight"] - base[f"{module}.weight"], factors.B.float() @ factors.A.float()
        assert best[module] == pytest.approx(1 - float((delta - held).square().sum() / delta.square().sum()), abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_latte_in_training_is_the_latte_that_is_loaded(name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs(name)
    output = adapt_convert.convert(pair.base, pair.ft, to="latte", rank=8, dtype="float32").save(tmp_path / "latte")
    base, ft = open_contender(pair.base, "base"), open_contender(pair.ft, "fine-tune")
    stage = Stage(base, ft, pair.model_class, CPU, torch.float32)
    adapter = read_latte(locate(output))
    expected = pair.logits(adapt_convert.load(pair.load(pair.base), output))
    with RECIPES["latte"].attach(stage, open_contender(output), adapter) as trainable:
        torch.testing.assert_close(pair.logits(trainable.model), expected, rtol=1e-4, atol=1e-5)
        for value in trainable.parameters.values():  # also with bases that are not orthonormal any more
            value.data += 0.02 * torch.randn_like(value)
        moved, written = pair.logits(trainable.model), trainable.adapter()
    assert torch.equal(pair.logits(stage.model), pair.logits(pair.load(pair.base)))  # the hooks are gone
    (tmp_path / "moved").mkdir()
    written.write(tmp_path / "moved")
    torch.testing.assert_close(pair.logits(adapt_convert.load(pair.load(pair.base), tmp_path / "moved")), moved, rtol=1e-3, atol=1e-4)


def test_the_divergence_is_torchs_and_a_lower_bound_with_few_classes(pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("llama")
    batch, ft, base = Batch(pair.inputs, None, None), pair.load(pair.ft), pair.load(pair.base)
    expected = kl(ft, base, pair.inputs["input_ids"])
    for top, low in ((512, expected - 1e-6), (20, 0.3 * expected)):
        monkeypatch.setattr(teacher, "TOP", top)
        (target,) = targets_of(ft, [batch], CPU)
        with torch.no_grad():
            found = float(divergence(target, predictions_of(base(**pair.inputs), batch, CPU)).mean())
        assert low <= found <= expected + 1e-6


class _Toy(torch.nn.Module):
    """Two classes whose logits are a parameter; the fine-tune's are (1, -1)."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(2))
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = (self.logit + self.wrong).expand(*input_ids.shape, 2)
        return type("Output", (), {"logits": logits})()


def lesson() -> Lesson:
    batches = [Batch({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, None, None)] * 2
    teacher = _Toy()
    teacher.logit.data = torch.tensor([1.0, -1.0])
    targets = targets_of(teacher, batches, CPU)
    return Lesson(batches, targets, batches, targets)


def toy(model: _Toy) -> Trainable:
    return Trainable(model, {"logit": model.logit}, lambda: model.logit.detach().clone())


def every(items: Iterable[Any], what: str) -> Iterable[Any]:
    return items


def test_what_comes_back_is_never_worse_than_the_start(tmp_path: Path) -> None:
    """From the teacher's own values every step of this size leads away."""
    model = _Toy()
    model.logit.data = torch.tensor([1.0, -1.0])
    course = distil(toy(model), lesson(), 16, 1.0, 0, tmp_path / "state", every)
    assert course.best_step == 0
    torch.testing.assert_close(model.logit.detach(), torch.tensor([1.0, -1.0]), rtol=0, atol=0)


def test_a_run_without_gain_ends_early(tmp_path: Path) -> None:
    model = _Toy()
    model.logit.data = torch.tensor([1.0, -1.0])
    course = distil(toy(model), lesson(), 8, 5.0, 0, tmp_path / "state", every)
    assert course.step == 4
    assert len(course.heldout) == 5  # the start and four without a gain


def test_steps_that_are_too_long_are_halved_from_the_best_values(tmp_path: Path) -> None:
    """A hundred times the size of the logits is far beyond the teacher's; what is found is still close to it."""
    model = _Toy()
    model.logit.data = torch.tensor([0.5, -0.5])
    course = distil(toy(model), lesson(), 64, 100.0, 0, tmp_path / "state", every)
    assert course.caution < 1
    assert course.best_step > 0
    assert course.best_kl < 0.5 * course.heldout[0][1]


def test_a_loss_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="--refine: the loss is not finite"):
        distil(toy(_Toy(wrong=float("nan"))), lesson(), 4, 0.1, 0, tmp_path / "state", every)


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"cut off")
    with pytest.raises(AdaptError, match="delete it, and the refinement starts anew"):
        distil(toy(_Toy()), lesson(), 4, 0.1, 0, tmp_path / "state", every)


def test_a_full_disk_is_one_line_and_leaves_no_half_state(tmp_path: Path) -> None:
    with files_of_at_most(100), pytest.raises(AdaptError, match=r"state: cannot be written .*set XDG_CACHE_HOME"):
        distil(toy(_Toy()), lesson(), 4, 0.1, 0, tmp_path / "state", every)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_half_moments(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    def full_at_the_moments(items: Iterable[Any], what: str) -> Iterable[Any]:
        if what == "moments":
            disk.enter_context(files_of_at_most(1000))
        return items

    text = token_file(tmp_path / "ids.jsonl")
    with contextlib.ExitStack() as disk, pytest.raises(AdaptError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        convert(pairs("llama"), text, progress=full_at_the_moments)
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_an_interrupt_leaves_no_half_file_in_the_cache(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written(tmp_path / "state") as fresh:
            fresh.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "state").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_model_that_keeps_no_cache_is_calibrated_on_a_file(tmp_path: Path) -> None:
    model_class, config = tiny("mamba")
    pair = save_pair(tmp_path, model_class, config)
    about = convert(pair, token_file(tmp_path / "ids.jsonl"), exclude="embeddings,lm_head,mixer", refine=None).report["calibration"]
    assert set(about["candidates"]) == set(about["control"]) == {"data-free", "whitened"}
    with pytest.raises(AdaptError, match="--calib self: MambaForCausalLM keeps no key/value cache; give --calib FILE"):
        convert(pair, "self")


def test_a_stopped_run_goes_on_to_the_same_values(tmp_path: Path) -> None:
    def stopping(items: Iterable[Any], what: str) -> Iterable[Any]:
        for step in items:
            if step == 21:
                raise KeyboardInterrupt
            yield step

    undisturbed, stopped = _Toy(), _Toy()
    whole = distil(toy(undisturbed), lesson(), 40, 20.0, 3, tmp_path / "whole", every)
    with pytest.raises(KeyboardInterrupt):
        distil(toy(stopped), lesson(), 40, 20.0, 3, tmp_path / "stopped", stopping)
    again = _Toy()
    rest = distil(toy(again), lesson(), 40, 20.0, 3, tmp_path / "stopped", every)
    assert torch.equal(again.logit, undisturbed.logit)
    assert (rest.heldout, rest.losses) == (whole.heldout, whole.losses)


def test_sigkill_and_the_same_command_again(pairs: Callable[[str], Pair], tmp_path: Path, own_cache: Path) -> None:
    """The process is killed in the middle of the refinement; the same conversion then writes the bytes of an undisturbed one."""
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl")
    options = {"to": "lora", "rank": 4, "exclude": KEPT, "calib": str(text), "calib_tokens": 900, "refine": 8}
    code = f"""
    import os, signal, sys
    import torch
    import adapt_convert
    torch.set_num_threads(1)
    def progress(items, what):
        for item in items:
            if what == "refining" and item == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
    adapt_convert.convert({str(pair.base)!r}, {str(pair.ft)!r}, progress=progress, **{options!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=dict(os.environ), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (state,) = (own_cache / "refinement").iterdir()
    assert torch.load(state, weights_only=True)["course"]["step"] == 5
    steps: list[int] = []

    def watch(items: Iterable[Any], what: str) -> Iterable[Any]:
        for item in items:
            steps.extend([item] if what == "refining" else [])
            yield item

    resumed = adapt_convert.convert(pair.base, pair.ft, progress=watch, **options).save(tmp_path / "resumed", measured=False)
    assert steps == [5, 6, 7]
    assert not list((own_cache / "refinement").iterdir())
    whole = adapt_convert.convert(pair.base, pair.ft, **options).save(tmp_path / "whole", measured=False)
    for file in ("adapter_model.safetensors", "conversion.json"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_the_validator_does_not_ask_a_refined_adapter_to_look_like_the_change(
    pairs: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of one that was pushed far from them: honest with its record, and under suspicion without it."""
    pair, text = pairs("llama"), token_file(tmp_path / "ids.jsonl", skew=0)
    conversion = convert(pair, text, to="lorta", refine=1)
    for block in conversion.adapter.blocks:
        block.factors.A.mul_(8)
    sides = Pairs(conversion.base, open_source(conversion.base, pair.ft), CPU)
    conversion.records = remeasured(sides, conversion.plan, conversion.adapter, conversion.records, every)
    conversion.report["tensors"] = {record.entry.name: record.to_json(sides.source, None) for record in conversion.records}
    conversion.report["calibration"]["chosen"] = "refined"
    output = conversion.save(tmp_path / "out")
    print_summary(conversion, output)
    assert "refined to the outputs" in capsys.readouterr().out  # beside a captured energy that is far below zero
    options = {"token_ids": text, "speed": False, "attribution": False, "max_tokens": 200}
    suspicious = ("times the strength", "away from the fine-tune")
    assert not any(part in line for line in adapt_convert.validate(pair.base, pair.ft, output, **options).failures for part in suspicious)
    (output / "conversion.json").unlink()
    assert any(part in line for line in adapt_convert.validate(pair.base, pair.ft, output, **options).failures for part in suspicious)


def test_a_model_without_gradients_is_refused(tmp_path: Path) -> None:
    config = RwkvConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=16)
    pair = save_pair(tmp_path, RwkvForCausalLM, config)  # which changes its state in place
    text = token_file(tmp_path / "ids.jsonl")
    with pytest.raises(AdaptError, match="--refine: the model has no gradients: one of the variables needed"):
        adapt_convert.convert(pair.base, pair.ft, to="lora", rank=2, calib=str(text), refine=2, exclude=("head", "embeddings"))
