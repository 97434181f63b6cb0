"""Calibration of mixtures: what each expert reads against what transformers multiplies, and solutions that know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import token_file
from conftest import Pair, save_pair
from families import tiny
from safetensors.torch import load_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import adapt_convert
from adapt_convert.convert.calibration.activations import captured_inputs
from adapt_convert.convert.calibration.whitened_lora import UNREACHED
from adapt_convert.convert.families import BY_MODEL_TYPE
from adapt_convert.convert.validation.outputs import Batch
from adapt_convert.formats.errors import AdaptError

pytestmark = pytest.mark.usefixtures("own_cache")
MIXTURES = [name for name, family in BY_MODEL_TYPE.items() if family.experts]
ROUTED = [name for name in MIXTURES if not name.startswith("llama4")]
BIASES = "gate_up_proj_bias,down_proj_bias"


class Products(TorchFunctionMode):
    """Everything that is multiplied with one of some matrices, by where these lie in memory."""

    def __init__(self, matrices: dict[int, str]) -> None:
        super().__init__()
        self.matrices, self.seen = matrices, dict[str, list[torch.Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            name = self.matrices.get(args[1].data_ptr())
            if name:
                self.seen.setdefault(name, []).append(args[0])
        return func(*args, **(kwargs or {}))


def stack_of(model: Any, name: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = model.model.layers[layer].get_submodule(BY_MODEL_TYPE[name].experts.stacked)
    return experts.gate_up_proj, experts.down_proj


def names_of(name: str, layer: int, number: int) -> tuple[list[str], str]:
    """The modules of one expert that read the stream, and the one that writes, as checkpoints name them."""
    experts = BY_MODEL_TYPE[name].experts
    assert experts is not None
    if experts.modules is None:
        path = f"model.layers.{layer}.{experts.stacked}.{number}"
        return [f"{path}.gate_up_proj"], f"{path}.down_proj"
    path = experts.path.format(layer, number)
    return [f"{path}.{module}" for module in experts.modules[:2]], f"{path}.{experts.modules[2]}"


@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_what_each_expert_reads_is_what_transformers_multiplies(name: str) -> None:
    torch.manual_seed(0)
    model_class, config = tiny(name, experts_implementation="eager")
    model = model_class(config).eval()
    assert model.config._experts_implementation == "eager"
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    ids = torch.randint(3, 96, (2, 5))
    places = {}
    readers: dict[str, list[str]] = {}
    for number in range(4):
        (gate_up, down), (reading, writing) = stack_of(model, name, 1), names_of(name, 1, number)
        places[gate_up[number].data_ptr()], places[down[number].data_ptr()] = reading[0], writing
        readers[reading[0]] = reading
    with Products(places) as products:
        model(input_ids=ids)
    wanted = [module for reading in readers.values() for module in reading] + [w for w in places.values() if w not in readers]
    batch = Batch({"input_ids": ids}, None, None)
    (found,) = captured_inputs(model, wanted, [batch], torch.device("cpu"))
    assert set(found) == set(wanted)
    assert products.seen
    for module, x in found.items():
        first = next((key for key, all_of in readers.items() if module in all_of), module)
        if first in products.seen:
            (given,) = products.seen[first]  # in another order
            assert x.shape == given.shape
            torch.testing.assert_close(x.T @ x, given.T @ given)
        else:
            assert len(x) == 0


def test_experts_that_show_no_routing_are_one_line() -> None:
    model_class, config = tiny("llama4_text")
    batch = Batch({"input_ids": torch.tensor([[3, 4, 5]])}, None, None)
    with pytest.raises(AdaptError, match="shows no routing"):
        list(captured_inputs(model_class(config).eval(), ["model.layers.1.feed_forward.experts.0.down_proj"], [batch], torch.device("cpu")))


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def named_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pair]:
    """A pair whose last layer sends no token to its last expert: the router's row for that is far below the others."""

    def change(model: Any) -> None:
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    name: str = request.param
    pair = save_pair(tmp_path_factory.mktemp(name), *tiny(name), change)
    for side in (pair.base, pair.ft):
        model = pair.load(side)
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            (mlp.router if name == "gpt_oss" else mlp.gate).weight[3] = -10 * (mlp.router if name == "gpt_oss" else mlp.gate).weight[
                :3
            ].sum(0)
            if name == "gpt_oss":
                mlp.router.bias[3] = -1e4
        model.save_pretrained(side)
    return name, pair


def test_solutions_know_what_experts_read(named_pair: tuple[str, Pair], tmp_path: Path, own_cache: Path) -> None:
    """The moments of every expert against its inputs in the fine-tune; an expert that nothing reaches keeps the data-free solution."""
    name, pair = named_pair
    text = token_file(tmp_path / "ids.jsonl")
    options = {"rank": 4, "exclude": f"embed_tokens,lm_head,{BIASES}", "calib": text, "calib_tokens": 600}
    conversion = adapt_convert.convert(pair.base, pair.ft, **options)
    about = conversion.report["calibration"]
    assert set(about["candidates"]) == {"data-free", "whitened"}
    (directory,) = (own_cache / "moments").iterdir()
    index = json.loads((directory / "index.json").read_text())
    reached = {module: int(load_file(directory / file)["rows"]) for module, file in index.items() if ".experts." in module}
    assert len(reached) == 8 * (3 if name == "mixtral" else 2)
    unreached = {module for module, rows in reached.items() if not rows}
    if name == "gpt_oss":
        assert {"model.layers.1.mlp.experts.3.gate_up_proj", "model.layers.1.mlp.experts.3.down_proj"} <= unreached
    rows = {module: row for module, row in conversion.report["tensors"].items() if ".experts." in module and row["status"] == "factored"}
    assert about["chosen"] == "whitened"
    assert {module.removesuffix(".weight") for module, row in rows.items() if row.get("reason") == UNREACHED} == unreached
    reading, writing = names_of(name, 0, 0)
    assert index[reading[0]] == index[reading[-1]]  # gate and up read the same
    assert index[reading[0]] != index[writing]


def test_a_calibrated_budget_holds_for_what_peft_stores(named_pair: tuple[str, Pair], tmp_path: Path) -> None:
    _, pair = named_pair
    text = token_file(tmp_path / "ids.jsonl")
    options = {"budget": 40_000, "exclude": f"embed_tokens,lm_head,{BIASES}", "calib": text, "calib_tokens": 512}
    conversion = adapt_convert.convert(pair.base, pair.ft, **options)
    assert set(conversion.report["calibration"]["candidates"]) == {"data-free", "whitened"}
    tensors = load_file(conversion.save(tmp_path / "out") / "adapter_model.safetensors")
    sizes = {key: tensor.nbytes for key, tensor in tensors.items() if ".lora_" in key}
    assert 30_000 < sum(sizes.values()) <= 40_000
    assert any("experts" in key for key in sizes)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_are_refined(tmp_path: Path, name: str) -> None:
    """What was best in training is what the written file gives when `peft` has loaded it; gate and up have no part in each other."""

    def change(model: Any) -> None:
        for parameter in (value for key, value in model.named_parameters() if "expert" in key):
            parameter += 0.1 * torch.randn_like(parameter)

    pair = save_pair(tmp_path, *tiny(name), change)
    text = token_file(tmp_path / "ids.jsonl")
    conversion = adapt_convert.convert(pair.base, pair.ft, rank=2, calib=text, calib_tokens=900, refine=12)
    about = conversion.report["calibration"]
    best = min(kl for _, kl in about["refinement"]["heldout"])
    assert about["candidates"]["refined"] == pytest.approx(best, rel=1e-3)
    assert about["candidates"]["refined"] < 0.97 * about["candidates"]["data-free"]
    assert about["chosen"] == "refined"
    out = conversion.save(tmp_path / "out")
    adapt_convert.merge(pair.base, out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(pair.load_peft(out)), pair.logits(pair.load(tmp_path / "merged")), atol=2e-4, rtol=2e-4)


def test_other_commands_on_a_mixture_and_a_text(named_pair: tuple[str, Pair], tmp_path: Path) -> None:
    """The plan weighs experts too; a LoDA leaves them out, and is fitted to the rest."""
    _, pair = named_pair
    options: dict[str, Any] = {"calib": token_file(tmp_path / "ids.jsonl"), "calib_tokens": 512}
    on_inputs = adapt_convert.plan(pair.base, pair.ft, fit_seconds=0, **options).data["on_inputs"]
    assert on_inputs["kinds"]["other"]["share"] > 0
    loda = adapt_convert.convert(pair.base, pair.ft, to="loda", rank=2, **options)
    assert "fitted" in loda.report["calibration"]["candidates"]
