"""LoDA at run time: a LoRA in peft's own words where f1 is zero, the written formula where it is not, and the base again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import adapt_convert
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.loda.macs import adapter_macs, lora_macs, weight_macs
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix
from adapt_convert.kernels.loda import loda_apply
from adapt_convert.kernels.loda_modules import LodaModule

RANK, K = 3, 5
MODULES = {"llama": "model.layers.{}.self_attn.{}_proj", "gpt2": "transformer.h.{}.attn.c_{}"}
NAMES = {"llama": "qkvo", "gpt2": ("attn", "proj")}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(out: int, width: int, variant: str, seed: int) -> LodaMatrix:
    """A map with every part that the variant has, all of them far from zero."""
    f1 = (draw(RANK, RANK, seed=seed + 1), draw(RANK, RANK, seed=seed + 2))
    base = LowRankDelta(draw(out, K, seed=seed + 3), draw(K, width, seed=seed + 4)) if variant.startswith("r-") else None
    keep = draw(out, width, seed=seed + 5) > 0 if variant.startswith("s-") else None
    f2 = draw(out, seed=seed + 6) if variant.endswith("+") else None
    return LodaMatrix(draw(RANK, width, seed=seed), draw(out, RANK, seed=seed + 7), f1, f2, base, keep)


def shapes_of(model: Any, name: str) -> dict[str, tuple[int, int]]:
    """`(out, in)` of the adapted modules, from what they make of an input and not from how their weights lie."""
    found = {}
    for layer in range(2):
        for role in NAMES[name]:
            module = MODULES[name].format(layer, role)
            weight = model.get_submodule(module).weight
            found[module] = tuple(weight.T.shape) if name == "gpt2" else tuple(weight.shape)
    return found


def save(model: Any, name: str, variant: str, directory: Path, **parts: Any) -> LodaAdapter:
    shapes = shapes_of(model, name)
    matrices = {module: matrix(*shape, variant, 10 * number) for number, (module, shape) in enumerate(shapes.items())}
    adapter = LodaAdapter(variant, matrices, torch.float32, **parts)
    directory.mkdir()
    adapter.write(directory)
    return adapter


def expected_output(x: torch.Tensor, weight: torch.Tensor, m: LodaMatrix) -> torch.Tensor:
    """The formula in row vectors and float64, norm and LeakyReLU written out."""

    def act(u: torch.Tensor) -> torch.Tensor:
        u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.where(u > 0, u, 0.8 * u)

    A, B = m.A.double().T, m.B.double().T
    assert m.f1 is not None
    if m.base is not None:
        weight = m.base.B.double() @ m.base.A.double()
    if m.keep is not None:
        weight = weight * m.keep
    z = x @ A
    f1 = act(z @ m.f1[0].double().T) @ m.f1[1].double().T
    f2 = m.f2.double() * act(f1 @ B) if m.f2 is not None else 0.0
    return x @ weight.T + z @ B + f1 @ B + f2


@pytest.mark.parametrize("variant", ["loda", "loda+", "r-loda", "r-loda+", "s-loda", "s-loda+"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_the_formula_and_unload_puts_every_bit_back(
    pairs: Callable[[str], Any], tmp_path: Path, name: str, variant: str
) -> None:
    pair = pairs(name)
    model = pair.load(pair.base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = pair.logits(model)
    norm = "model.norm.weight" if name == "llama" else "transformer.ln_f.weight"
    adapter = save(model, name, variant, tmp_path / "a", exact={norm: 2 * before[norm]})
    assert adapt_convert.load(model, tmp_path / "a") is model
    for module, m in adapter.matrices.items():
        live = model.get_submodule(module)
        assert isinstance(live, LodaModule)
        x = draw(4, m.shape[1], seed=99)
        weight = before[f"{module}.weight"].double()
        expected = expected_output(x.double(), weight.T if name == "gpt2" else weight, m)
        expected = expected + before.get(f"{module}.bias", torch.zeros(1)).double()
        torch.testing.assert_close(live(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.state_dict.__self__.get_parameter(norm), 2 * before[norm])
    assert not torch.allclose(pair.logits(model), plain, atol=1e-2)
    adapt_convert.unload(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(pair.logits(model), plain)


@pytest.mark.parametrize("zero", ["no f1", "f1 of zeros", "f1 and f2 of zeros"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making
def test_without_f1_it_is_the_lora_that_peft_runs_bit_for_bit(pairs: Callable[[str], Any], tmp_path: Path, name: str, zero: str) -> None:
    pair = pairs(name)
    options = {"rank": 4, "exclude": "embed_tokens,lm_head,wte,wpe,norm,input_layernorm,post_attention_layernorm,ln_1,ln_2,ln_f"}
    lora = adapt_convert.convert(pair.base, pair.ft, to="lora", **options).save(tmp_path / "lora")
    held = load_file(lora / "adapter_model.safetensors")
    modules = {key.removesuffix(".lora_A.weight").removeprefix("base_model.model.") for key in held if key.endswith("lora_A.weight")}
    matrices = {}
    for module in modules:
        A, B = (held[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        zeros = torch.zeros(4, 4)
        f1 = None if zero == "no f1" else (torch.ones(4, 4), zeros)
        matrices[module] = LodaMatrix(A, B, f1, torch.ones(len(B)) if zero == "f1 and f2 of zeros" else None)
    (tmp_path / "loda").mkdir()
    LodaAdapter("loda", matrices, torch.float32).write(tmp_path / "loda")
    model = pair.load_peft(lora)
    for key in held:  # a bias is no matter of a LoDA's map
        if key.endswith("lora_B.bias"):
            module = model.get_submodule(key.removesuffix(".lora_B.bias"))
            torch.nn.init.zeros_(module.lora_B["default"].bias)
    assert torch.equal(pair.logits(adapt_convert.load(pair.load(pair.base), tmp_path / "loda")), pair.logits(model))


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", ["loda", "loda+", "r-loda", "r-loda+"])
def test_macs_are_half_of_the_operations_that_torch_counts(variant: str) -> None:
    """And `flop_counter`, which counts two for a multiply-accumulate, sees every product that a forward pass does."""
    out, width, tokens = 24, 40, 7
    m = matrix(out, width, variant, 0)
    layer = torch.nn.Linear(width, out)
    live = LodaModule(layer, m, layer.weight)
    x = draw(tokens, width, seed=1)
    counted = flops(lambda: live(x)) / 2 / tokens
    assert counted == adapter_macs(m) + weight_macs(m)
    linear = LodaMatrix(m.A, m.B)
    assert flops(lambda: (layer(x), loda_apply(x, m.A, m.B))) / 2 / tokens == lora_macs(m) == adapter_macs(linear) + weight_macs(linear)
    by_hand = {
        "loda": out * width + RANK * (out + width) + 2 * RANK**2,
        "loda+": out * width + RANK * (2 * out + width) + 2 * RANK**2,
        "r-loda": K * (out + width) + RANK * (out + width) + 2 * RANK**2,
        "r-loda+": K * (out + width) + RANK * (2 * out + width) + 2 * RANK**2,
    }
    assert counted == by_hand[variant]


def test_macs_of_a_sparse_weight_are_the_entries_that_stay() -> None:
    m = matrix(24, 40, "s-loda", 0)
    assert m.keep is not None
    weight = scipy.sparse.csr_matrix(torch.where(m.keep, draw(24, 40, seed=1), 0).numpy())
    assert weight_macs(m) == weight.nnz < 24 * 40
    assert adapter_macs(m) == RANK * 64 + 2 * RANK**2


def test_gradients_reach_every_part(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("llama")
    model = pair.load(pair.base)
    save(model, "llama", "loda+", tmp_path / "a")
    live = adapt_convert.load(model, tmp_path / "a").get_submodule(MODULES["llama"].format(0, "q"))
    parts = [live.A, live.B, live.f1_in, live.f1_out, live.f2]
    for part in parts:
        part.requires_grad_()
    functional.cross_entropy(model(**pair.inputs).logits.flatten(0, 1), pair.inputs["input_ids"].flatten()).backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)


def test_an_adapter_of_another_model_is_refused_and_leaves_the_model_alone(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair = pairs("llama")
    model = pair.load(pair.base)
    plain = pair.logits(model)
    for module, shape, message in [
        ("model.layers.0.self_attn.q_proj", (31, 32), r"the adapter's map of model\.layers\.0\.self_attn\.q_proj is \[31, 32\]"),
        ("model.layers.7.self_attn.q_proj", (32, 32), r"which this LlamaForCausalLM does not have"),
    ]:
        first = {"model.layers.1.self_attn.k_proj": matrix(16, 32, "s-loda", 0)}
        directory = tmp_path / module
        directory.mkdir()
        LodaAdapter("loda", first | {module: matrix(*shape, "loda", 1)}, torch.float32).write(directory)
        with pytest.raises(AdaptError, match=message):
            adapt_convert.load(model, directory)
        assert torch.equal(pair.logits(model), plain)
