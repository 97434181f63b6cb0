"""Several LoRAs in one batch: every row equals what `peft` computes with that row's LoRA alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapt_convert
from adapt_convert.formats.errors import AdaptError

from .test_latte import batch, logits, save_planted

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making

TARGETS = {
    "llama": [["q_proj", "v_proj", "down_proj"], ["gate_proj", "v_proj"], "all-linear"],
    "gpt2": [["c_attn"], ["c_proj", "c_fc"], ["c_attn", "c_fc"]],
    "opt": [["fc1", "fc2"], ["q_proj"], "all-linear"],
}


def save_loras(case: Any, targets: list[Any], directory: Path) -> list[Path]:
    """LoRAs that `peft` wrote: ranks 1, 2, 3 and other scalings, on other modules each."""
    paths = []
    for number, names in enumerate(targets, 1):
        config = peft.LoraConfig(r=number, lora_alpha=3 * number, target_modules=names, use_rslora=number == 2)
        model = peft.get_peft_model(case.model(), config)
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(100 * number + seed))
        model.save_pretrained(directory / f"lora{number}")
        paths.append(directory / f"lora{number}")
    return paths


def check_rows_and_unload(case: Any, model: Any, before: dict[str, Any], inputs: dict[str, Any], ids: list[int], paths: list[Path]) -> None:
    """Every row of the batch equals the base, or what `peft` computes with its LoRA alone; then the model is as `before`, bit for bit."""
    generation = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with adapt_convert.task_ids(model, ids), torch.no_grad():
        mixed, written = model(**inputs).logits, model.generate(**inputs, **generation)
    for row, task in enumerate(ids):
        own = peft.PeftModel.from_pretrained(case.model(), paths[task - 1]).eval() if task else case.model()
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(mixed[row][one["attention_mask"][0].bool()], logits(own, one), atol=1e-4, rtol=0)
        assert torch.equal(written[row], own.generate(**one, **generation)[0])
    adapt_convert.unload(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_every_row_equals_its_own_lora_in_peft(name: str, tmp_path: Path) -> None:
    case, ids = save_planted(tmp_path, name), [2, 0, 3, 1, 2]
    paths = save_loras(case, TARGETS[name], tmp_path)
    inputs, model = batch(rows=len(ids)), case.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapt_convert.load(model, paths)
    check_rows_and_unload(case, model, before, inputs, ids, paths)


def test_a_list_of_one_is_that_lora_on_every_row_and_more_are_the_base_until_tasks_are_chosen(tmp_path: Path) -> None:
    case, inputs = save_planted(tmp_path, "llama"), batch()
    paths = save_loras(case, TARGETS["llama"], tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(case.model(), paths[0]).eval(), inputs)
    torch.testing.assert_close(logits(adapt_convert.load(case.model(), paths[:1]), inputs), expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(adapt_convert.load(case.model(), paths), inputs), logits(case.model(), inputs))


def test_what_cannot_be_served_row_by_row_is_refused_in_one_line(tmp_path: Path) -> None:
    case = save_planted(tmp_path, "llama")
    (plain,) = save_loras(case, ["all-linear"], tmp_path)
    whole = peft.get_peft_model(case.model(), peft.LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    whole.save_pretrained(tmp_path / "whole")
    other = save_planted(tmp_path / "other", "llama", hidden_size=64, head_dim=8)
    model = case.model()
    expected = logits(model, batch())
    for adapters, message in [
        ([plain, tmp_path / "whole"], r"whole: holds lm_head\.weight, which is no LoRA of a linear layer"),
        ([plain, case.directory / "base"], r"base: is no LoRA"),
        ([], r"the list of LoRAs is empty"),
    ]:
        with pytest.raises(AdaptError, match=message) as caught:
            adapt_convert.load(model, adapters)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdaptError, match=r"its delta of .* is \[32, 48\], the model's weight \[64, 48\]"):
        adapt_convert.load(other.model(), [plain])
    assert torch.equal(logits(model, batch()), expected)
