"""The sizes that a preflight names, held against the files that are then written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibrating import token_file
from click.testing import CliRunner
from conftest import Pair, save_pair
from families import tiny
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.formats.sizes import size_text


def predicted_and_written(base: Path, source: Path, out: Path, **options: Any) -> tuple[dict[str, Any], int]:
    planned = adapt_convert.inspect(base, source, **options)
    adapt_convert.convert(base, source, **options).save(out)
    (file,) = out.glob("*.safetensors")
    return planned, file.stat().st_size


SIZED: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "lora for a server": {"rank": 8, "profile": "vllm", "exclude": "embed_tokens,lm_head"},
    "lorta": {"to": "lorta", "rank": 16},
    "lorta of all": {"to": "lorta", "rank": 16, "target_modules": "all-linear"},
    "lorta in a budget": {"to": "lorta", "budget": 20_000},
    "latte": {"to": "latte", "rank": 8},
    "latte in a budget": {"to": "latte", "budget": 20_000},
    "latte by layer": {"to": "latte", "rank": 8, "segments": 2},
}


@pytest.mark.parametrize(
    ("case", "name"),  # grouped queries, biases, transposed and fused matrices, for which vLLM has no LoRA
    [(case, name) for case in SIZED for name in ("llama", "qwen2", "gpt2") if (case, name) != ("lora for a server", "gpt2")],
)
def test_a_size_that_is_said_is_that_of_the_file(case: str, name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs(name)
    planned, size = predicted_and_written(pair.base, pair.ft, tmp_path / "out", **SIZED[case])
    assert not planned["predicted_at_most"]
    assert size <= planned["predicted_bytes"] <= 1.1 * size


def test_fused_matrices_of_the_mlp_are_counted_as_two(tmp_path: Path) -> None:
    model_class, config = tiny("phi3")
    pair = save_pair(tmp_path, model_class, config)
    planned, size = predicted_and_written(pair.base, pair.ft, tmp_path / "out", to="lorta", rank=40, target_modules="mlp")
    assert size <= planned["predicted_bytes"] <= 1.1 * size


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"budget": 20_000}, {"to": "latte", "energy": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_only_the_work_can_show_is_a_bound(options: dict[str, Any], name: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs(name)
    planned, size = predicted_and_written(pair.base, pair.ft, tmp_path / "out", **options)
    assert planned["predicted_at_most"]
    assert size <= planned["predicted_bytes"]
    printed = CliRunner().invoke(main, ["inspect", str(pair.base), str(pair.ft), *_typed(options)]).output
    assert f"; at most {size_text(planned['predicted_bytes'])}, peak memory of the conversion" in printed


BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "norms folded into matrices that are no targets": (
        "llama",
        {"to": "latte", "energy": 0.99, "target_modules": "attention", "exclude": "embed_tokens,lm_head"},
    ),
    "the same in a budget": ("llama", {"to": "latte", "budget": 20_000, "target_modules": "attention", "exclude": "embed_tokens,lm_head"}),
    "segments that are looked for": ("llama", {"to": "latte", "energy": 0.99, "segments": "auto"}),
    "one segment for each layer": ("bert", {"to": "latte", "energy": 0.99}),
    "zeros that a server wants": ("llama", {"energy": 0.999, "target_modules": "q_proj", "profile": "sglang"}),
    "three pairs in a fused matrix": ("gpt2", {"to": "latte", "construction": "score", "rank": 4}),
    "a shared table": ("llama-tied", {"rank": 8, "target_modules": "all-linear,embed_tokens"}),
}


@pytest.mark.parametrize("case", BOUNDED)
def test_no_size_is_above_its_bound(case: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    name, options = BOUNDED[case]
    planned, size = predicted_and_written(pairs(name).base, pairs(name).ft, tmp_path / "out", **options)
    assert size <= planned["predicted_bytes"]


@pytest.mark.parametrize("options", [{"to": "loda"}, {"to": "loda+"}, {"to": "s-loda", "keep": 0.1}], ids=str)
def test_the_maps_of_a_loda_are_counted(options: dict[str, Any], pairs: Any, tmp_path: Path, own_cache: Path) -> None:
    text = token_file(tmp_path / "ids.jsonl")
    options |= {"rank": 2, "calib": text, "calib_tokens": 256, "target_modules": "q_proj,o_proj", "exclude": "embed_tokens,lm_head"}
    planned, size = predicted_and_written(pairs("llama").base, pairs("llama").ft, tmp_path / "out", **options)
    assert size <= planned["predicted_bytes"]
    assert planned["predicted_at_most"] or planned["predicted_bytes"] <= 1.1 * size


def _typed(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("to", ["lora", "latte", "lorta"])
def test_a_rank_that_is_looked_for_is_bounded(to: str, make_pair: Any, tmp_path: Path, own_cache: Path) -> None:
    """A divergence that rank 1 reaches, of ranks that may go up to the width of the model."""
    pair = make_pair(tmp_path, "llama", lambda model: model.model.layers[0].self_attn.q_proj.weight.add_(0.01))
    text = token_file(tmp_path / "ids.jsonl")
    planned, size = predicted_and_written(
        pair.base, pair.ft, tmp_path / "out", to=to, target_kl=1.0, calib=text, calib_tokens=256, exclude="embed_tokens,lm_head"
    )
    assert planned["predicted_at_most"]
    assert size < planned["predicted_bytes"] / 4
    assert planned["predicted_peak_memory"] is None  # models are run


METHODS = {
    "VeRA": peft.VeraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("to", ["lora", "latte"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_unknown_rank_bounds_its_conversion(method: str, to: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    source = _saved(pairs("llama"), METHODS[method], tmp_path / "adapter")
    planned, size = predicted_and_written(pairs("llama").base, source, tmp_path / "out", to=to)
    assert planned["predicted_at_most"]
    assert size <= planned["predicted_bytes"]


def test_a_lora_that_keeps_its_rank_has_the_size_that_is_said(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    source = _saved(pairs("llama"), peft.LoraConfig(r=20, target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    planned, size = predicted_and_written(pairs("llama").base, source, tmp_path / "out")
    assert not planned["predicted_at_most"]
    assert size <= planned["predicted_bytes"] <= 1.1 * size


def _saved(pair: Pair, config: Any, path: Path) -> Path:
    """A PEFT adapter of the base whose every parameter is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(pair.load(pair.base), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(path)
    return path


def test_a_lorta_of_half_precision_may_be_stored_in_float32(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama")
    for side in (pair.base, pair.ft):
        path = side / "model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    options = {"to": "lorta", "rank": 16, "exclude": "embed_tokens,lm_head"}
    sizes = {}
    for dtype, at_most in ((None, True), ("float32", False), ("bfloat16", False)):
        planned, sizes[dtype] = predicted_and_written(pair.base, pair.ft, tmp_path / str(dtype), dtype=dtype, **options)
        assert planned["predicted_at_most"] is at_most
        assert sizes[dtype] <= planned["predicted_bytes"]
    assert sizes["bfloat16"] < sizes["float32"]
