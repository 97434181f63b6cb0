"""What a LatTE is not made of and not loaded onto: each refused in one line, with the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM

import adapt_convert
from adapt_convert.convert.conversion import convert
from adapt_convert.formats.errors import AdaptError

from .test_latte import CASES, RANK, Planted, batch, logits, planted

__all__ = ["planted"]  # the fixture


def _changed(case: Planted, out: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Any:
    """The model with a LatTE whose config and tensors were changed by hand."""
    from safetensors.torch import load_file, save_file

    config = json.loads((case.directory / "latte" / "latte_config.json").read_text())
    tensors = load_file(case.directory / "latte" / "latte.safetensors")
    change(config, tensors)
    (out / "changed").mkdir()
    (out / "changed" / "latte_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "changed" / "latte.safetensors")
    return adapt_convert.load(case.model(), out / "changed")


REFUSALS: dict[str, tuple[Callable[[Planted, Path], Any], str]] = {
    "rank above d": (
        lambda case, out: convert(case.directory / "base", case.directory / "ft1", to="latte", rank=33),
        r"--rank 33: the residual stream of .* is 32 wide",
    ),
    "segments above layers": (
        lambda case, out: convert(case.directory / "base", case.directory / "ft1", to="latte", rank=2, segments=4),
        r"--segments 4: .* has 3 layers",
    ),
    "other values": (
        lambda case, out: adapt_convert.load(case.model("ft1"), case.directory / "latte"),
        r"made for another base: model\.layers\.0\.self_attn\.q_proj\.weight has other values",
    ),
    "other depth": (
        lambda case, out: adapt_convert.load(_resized(case, num_hidden_layers=2), case.directory / "latte"),
        r"covers 3 layers, the model has 2: made for another base",
    ),
    "other width": (
        lambda case, out: adapt_convert.load(_resized(case, hidden_size=64, head_dim=8), case.directory / "latte"),
        r"made for another base",
    ),
    "other architecture": (
        lambda case, out: adapt_convert.load(MistralForCausalLM(CASES["mistral"][1]), case.directory / "latte"),
        r"is made for llama, the model is mistral",
    ),
    "a block of no matrix": (
        lambda case, out: _changed(case, out, lambda c, t: t.update({"1.reader.model.layers.9.mlp.up_proj": torch.ones(48, RANK)})),
        r"1\.reader\.model\.layers\.9\.mlp\.up_proj is of no matrix that a LatTE of llama expands",
    ),
    "a bias of another length": (
        lambda case, out: _changed(case, out, lambda c, t: t.update({"1.bias.model.layers.0.self_attn.q_proj": torch.ones(7)})),
        r"has a block of \[7\], the model needs \[32\]",
    ),
    "no fingerprint": (
        lambda case, out: _changed(case, out, lambda c, t: c["fingerprints"].pop("model.layers.1.mlp.up_proj")),
        r"has no fingerprint of model\.layers\.1\.mlp\.up_proj: the file was changed",
    ),
    "a norm in front of readers by value": (
        lambda case, out: _changed(case, out, lambda c, t: t.update({"1.exact.model.layers.0.input_layernorm.weight": torch.ones(32)})),
        r"holds model\.layers\.0\.input_layernorm by value, which its matrices contain",
    ),
    "a value of nothing": (
        lambda case, out: _changed(case, out, lambda c, t: t.update({"1.exact.foo.bar": torch.ones(3)})),
        r"the adapter holds foo\.bar, which this LlamaForCausalLM does not have",
    ),
    "a norm of another size": (
        lambda case, out: _changed(case, out, lambda c, t: t.update({"1.exact.model.norm.weight": torch.ones(3)})),
        r"model\.norm\.weight has another shape than the model's \[32\]",
    ),
    "no transformers model": (
        lambda case, out: adapt_convert.load(torch.nn.Linear(2, 2), case.directory / "latte"),
        r"is made for llama, the model is not a transformers model",
    ),
    "no model": (lambda case, out: adapt_convert.load(str(case.directory), out), "load: str is no model; load it with"),
    "no path": (lambda case, out: adapt_convert.load(case.model(), 3), r"load: 3 is neither a path or Hub id nor a list of them"),
    "twice": (
        lambda case, out: adapt_convert.load(adapt_convert.load(case.model(), case.directory / "latte"), case.directory / "latte"),
        r"carries an adapter already",
    ),
}


def _resized(case: Planted, **sizes: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**CASES["llama"][1].to_diff_dict(), **sizes}))


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_take_one_line(what: str, planted: Callable[[str], Planted], tmp_path: Path) -> None:
    act, message = REFUSALS[what]
    with pytest.raises(AdaptError, match=message) as caught:
        act(planted("llama"), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unsupported_architecture_is_named_with_what_is_supported(pairs: Callable[[str], Any]) -> None:
    pair = pairs("t5")
    with pytest.raises(AdaptError, match=r"LatTE does not support t5; supported: llama, mistral, .*; use --to lora"):
        convert(pair.base, pair.ft, to="latte", rank=2)


def test_a_refused_load_leaves_the_model_as_it_was(planted: Callable[[str], Planted], tmp_path: Path) -> None:
    """The block of the last matrix has a wrong shape, so that all the others are swapped before it is met."""
    from safetensors.torch import load_file, save_file

    case, inputs = planted("llama"), batch()
    broken = tmp_path / "latte"
    broken.mkdir()
    tensors = load_file(case.directory / "latte" / "latte.safetensors")
    tensors["1.writer.model.layers.2.mlp.down_proj"] = torch.zeros(RANK, 47)
    save_file(tensors, broken / "latte.safetensors")
    (broken / "latte_config.json").write_bytes((case.directory / "latte" / "latte_config.json").read_bytes())
    model = case.model()
    expected = logits(model, inputs)
    with pytest.raises(AdaptError, match=r"down_proj: has a block of \[6, 47\], the model needs \[6, 48\]"):
        adapt_convert.load(model, broken)
    assert torch.equal(logits(model, inputs), expected)


def test_a_model_that_carries_an_adapter_is_neither_saved_nor_given_back_in_another_dtype(
    planted: Callable[[str], Planted], tmp_path: Path
) -> None:
    case = planted("llama")
    model = adapt_convert.load(case.model(), case.directory / "latte")
    with pytest.raises(AdaptError, match=r"would be saved with its parts missing; call adapt_convert\.unload"):
        model.save_pretrained(tmp_path / "saved")
    before = logits(adapt_convert.load(case.model(), case.directory / "latte").bfloat16(), batch())
    model.bfloat16()
    with pytest.raises(AdaptError, match=r"was cast from torch\.float32 to torch\.bfloat16 while it carried the adapter"):
        adapt_convert.unload(model)
    assert torch.equal(logits(model, batch()), before)  # a refusal changes nothing
    model = adapt_convert.load(case.model(), case.directory / "latte").to("meta")
    assert all(parameter.is_meta for parameter in adapt_convert.unload(model).parameters())  # moved, not cast
