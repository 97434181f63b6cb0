"""Shared LoRAs: subspaces against dense algebra, one adapter taken out again by `peft`, mixed batches, and malformed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.shared_lora.subspace import joint_subspaces
from adapt_convert.formats.errors import AdaptError

from .test_latte import batch, logits, save_planted
from .test_lora_modules import TARGETS, check_rows_and_unload, save_loras

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # of peft's own making
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def random_deltas(count: int, rank: int, rows: int = 20, columns: int = 14) -> list[LowRankDelta]:
    generator = torch.Generator().manual_seed(0)
    return [
        LowRankDelta(torch.randn(rows, rank, generator=generator), number * torch.randn(rank, columns, generator=generator))
        for number in range(1, count + 1)
    ]


def captured(deltas: list[LowRankDelta], U: torch.Tensor, V: torch.Tensor) -> float:
    """The sum over unit changes of `||U^T D V^T||^2`, from dense matrices."""
    return sum(float((U.T @ d.dense().double() @ V.T).square().sum() / d.dense().double().square().sum()) for d in deltas)


def test_subspaces_are_exact_at_the_sum_of_the_ranks() -> None:
    deltas = random_deltas(count=3, rank=4)
    pair = joint_subspaces(deltas, 12)
    assert (pair.U.shape, pair.V.shape) == ((20, 12), (12, 14))
    torch.testing.assert_close(pair.U.T @ pair.U, torch.eye(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.V @ pair.V.T, torch.eye(12), atol=1e-5, rtol=0)
    for delta in deltas:
        dense = delta.dense()
        torch.testing.assert_close(pair.U @ (pair.U.T @ dense @ pair.V.T) @ pair.V, dense, atol=1e-4, rtol=0)


def test_one_delta_alone_gets_its_own_singular_vectors() -> None:
    delta = random_deltas(count=1, rank=6)[0]
    pair = joint_subspaces([delta], 3)
    values = torch.linalg.svdvals(delta.dense().double())
    assert captured([delta], pair.U.double(), pair.V.double()) == pytest.approx(float(values[:3].square().sum() / values.square().sum()))


def test_subspaces_beat_those_of_stacked_matrices_and_no_step_improves_them() -> None:
    """The stacked SVDs of both sides are where the search starts; at its end each side is the best for the other."""
    deltas = random_deltas(count=5, rank=4)
    pair = joint_subspaces(deltas, 5)
    U, V = pair.U.double(), pair.V.double()
    unit = [d.dense().double() / d.dense().double().norm() for d in deltas]
    start_u = torch.linalg.svd(torch.cat(unit, dim=1)).U[:, :5]
    start_v = torch.linalg.svd(torch.cat(unit)).Vh[:5]
    found = captured(deltas, U, V)
    assert found > captured(deltas, start_u, start_v) + 1e-4
    best_u = torch.linalg.svd(torch.cat([d @ V.T for d in unit], dim=1)).U[:, :5]
    best_v = torch.linalg.svd(torch.cat([U.T @ d for d in unit])).Vh[:5]
    assert captured(deltas, best_u, V) == pytest.approx(found, rel=1e-5)
    assert captured(deltas, U, best_v) == pytest.approx(found, rel=1e-5)


def test_subspaces_are_no_wider_than_what_the_deltas_span() -> None:
    first = random_deltas(count=1, rank=2)[0]
    pair = joint_subspaces([first, LowRankDelta(first.B * 3, first.A)], 8)
    assert (pair.U.shape, pair.V.shape) == ((20, 2), (2, 14))


@pytest.mark.parametrize("rank", [2, 6])  # below and at the sum of the ranks 1, 2, 3
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_taken_out_is_in_peft_what_the_bundle_holds(name: str, rank: int, tmp_path: Path) -> None:
    case = save_planted(tmp_path, name)
    paths = save_loras(case, TARGETS[name], tmp_path)
    conversion = adapt_convert.bundle(tmp_path / "base", paths, to="shared-lora", rank=rank)
    bundled = conversion.save(tmp_path / "shared")
    tensors = load_file(bundled / "shared_lora.safetensors")
    for number, path in enumerate(paths, 1):
        taken = adapt_convert.convert(tmp_path / "base", bundled, task=path.name, to="lora", rank=rank).save(tmp_path / f"out{number}")
        before, after = (peft.PeftModel.from_pretrained(case.model(), adapter) for adapter in (path, taken))
        residual = energy = 0.0
        for module, layer in before.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                key = module.removeprefix("base_model.model.")
                own, exported = _delta(layer), _delta(after.get_submodule(module))
                held = tensors[f"U.{key}"] @ tensors[f"{number}.core.{key}"] @ tensors[f"V.{key}"]
                torch.testing.assert_close(exported, held, atol=1e-5, rtol=0)
                residual += float((own - held).double().square().sum())
                energy += float(own.double().square().sum())
        assert conversion.report["tasks"][path.name] == pytest.approx(1 - residual / energy, abs=1e-5)
        if rank == 6:
            assert residual / energy < 1e-9
            one = batch(rows=1)
            torch.testing.assert_close(logits(after.eval(), one), logits(before.eval(), one), atol=1e-4, rtol=0)


def _delta(layer: Any) -> torch.Tensor:
    """`(out, in)`, also of GPT-2's transposed layers."""
    return layer.scaling["default"] * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_of_a_mixed_batch_equals_its_own_lora_in_peft(name: str, tmp_path: Path) -> None:
    case, ids = save_planted(tmp_path, name), [2, 0, 3, 1, 2]
    paths = save_loras(case, TARGETS[name], tmp_path)
    adapt_convert.bundle(tmp_path / "base", paths, to="shared-lora", rank=6).save(tmp_path / "shared")
    inputs, model = batch(rows=len(ids)), case.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = logits(model, inputs)
    adapt_convert.load(model, tmp_path / "shared")
    torch.testing.assert_close(logits(model, inputs), plain, atol=0, rtol=0)  # several adapters and no ids: the base
    check_rows_and_unload(case, model, before, inputs, ids, paths)


def test_fine_tunes_are_bundled_by_their_matrices(make_pair: Any, tmp_path: Path) -> None:
    """Dense changes: figures against dense algebra, and the whole of them at full rank."""
    pair = make_pair(tmp_path, "llama")
    exclude = "embed_tokens,input_layernorm,post_attention_layernorm,norm"
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    for rank, least in ((4, 0.3), (48, 1 - 1e-6)):
        conversion = adapt_convert.bundle(pair.base, [pair.ft, pair.ft], to="shared-lora", rank=rank, exclude=exclude)
        conversion.save(tmp_path / f"shared{rank}")
        tensors = load_file(tmp_path / f"shared{rank}" / "shared_lora.safetensors")
        modules = [key.removeprefix("U.") for key in tensors if key.startswith("U.")]
        residual = energy = 0.0
        for module in modules:
            change = ft[f"{module}.weight"] - base[f"{module}.weight"]
            held = tensors[f"U.{module}"] @ tensors[f"1.core.{module}"] @ tensors[f"V.{module}"]
            residual += float((change - held).double().square().sum())
            energy += float(change.double().square().sum())
        assert len(modules) == 15
        assert conversion.report["tasks"] == pytest.approx(dict.fromkeys(("ft", "ft-2"), 1 - residual / energy), abs=1e-5)
        assert conversion.report["tasks"]["ft"] > least


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base`, three LoRAs and the shared LoRA of them."""
    directory = tmp_path_factory.mktemp("shared")
    case = save_planted(directory, "llama")
    paths = save_loras(case, TARGETS["llama"], directory)
    adapt_convert.bundle(directory / "base", paths, to="shared-lora", rank=6).save(directory / "shared")
    return directory


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_bundles_and_takes_one_out(shared: Path, tmp_path: Path) -> None:
    loras = [shared / f"lora{number}" for number in (1, 2, 3)]
    made = run("bundle", shared / "base", *loras, "--to", "shared-lora", "--rank", 6, "-o", tmp_path / "both", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["tasks"] == pytest.approx(dict.fromkeys(("lora1", "lora2", "lora3"), 1.0))
    assert json.loads((tmp_path / "both" / "conversion.json").read_text())["target"] == "shared-lora"
    assert "Shared LoRA" in (tmp_path / "both" / "README.md").read_text()
    assert (tmp_path / "both" / "shared_lora.safetensors").stat().st_size == json.loads(made.stdout)["bytes"]
    taken = run("delta", shared / "base", tmp_path / "both", "--task", "2", "--rank", 2, "-o", tmp_path / "two")
    assert taken.exit_code == 0, taken.output
    assert json.loads((tmp_path / "two" / "conversion.json").read_text())["captured_energy"] == pytest.approx(1.0)
    described = json.loads(run("inspect", tmp_path / "both", "--json").stdout)
    assert (described["kind"], described["tasks"], described["rank"]) == ("SHARED_LORA", ["lora1", "lora2", "lora3"], 6)
    assert run("delta", shared / "base", tmp_path / "both", "--task", "lora1", "--dry-run").exit_code == 0
    assert run("push", tmp_path / "both", "org/both", "--dry-run").exit_code == 0


def test_an_adapter_of_no_given_size_has_the_rank_of_its_bundle_and_is_said_to(shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    taken = run("delta", shared / "base", shared / "shared", "--task", "lora1")
    assert taken.exit_code == 0, taken.output
    assert "note: no size is given: ranks 4 to 6, as in the source; --rank N makes it smaller" in taken.output
    report = json.loads((tmp_path / "shared-lora1-lora" / "conversion.json").read_text())
    assert {row["rank"] for row in report["tensors"].values()} == {4, 6}  # of three LoRAs of ranks 1, 2 and 3
    assert "no size is given" not in run("delta", shared / "base", shared / "shared", "--task", "lora1", "--rank", 2, "--dry-run").output


def test_of_one_rank_for_all_the_largest_is_said(shared: Path, tmp_path: Path) -> None:
    arguments = ("delta", shared / "base", shared / "shared", "--task", "lora1", "--for", "sglang", "-o", tmp_path / "out")
    taken = run(*arguments)
    assert taken.exit_code == 0, taken.output
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())["profile"]["rank"]
    assert f"no size is given: rank {written} for all, the largest of the source's, as SGLang takes one rank" in taken.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delta", "base", "shared"], "take one: adapt-convert delta BASE"),
        (["delta", "base", "shared", "--task", "lora9"], "--task lora9"),
        (["delta", "base", "lora1", "--task", "1"], "is no shared LoRA"),
        (["delta", "shared", "lora1"], "BASE has to be the full model"),
        (["merge", "base", "shared", "-o", "out"], "holds several adapters"),
        (["validate", "base", "base", "shared"], "is a shared LoRA"),
        (["bundle", "base", "lora1", "--to", "shared-lora", "--energy", "0.9", "-o", "out"], "takes --rank"),
        (["bundle", "base", "lora1", "--to", "shared-lora", "--segments", "2", "-o", "out"], "--segments"),
        (["bundle", "base", "ft1", "--to", "shared-lora", "-o", "out"], "which all rows of a batch share"),
        (["bundle", "base", "lora1", "--to", "lorta", "-o", "out"], "--to shared-lora"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(arguments: list[str], message: str, shared: Path, tmp_path: Path) -> None:
    names = {name: str(shared / name) for name in ("base", "shared", "lora1", "ft1")} | {"out": str(tmp_path / "out")}
    result = run(*(names.get(word, word) for word in arguments))
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_one_of_several_is_taken_out_before_it_is_calibrated(shared: Path) -> None:
    for make in (adapt_convert.convert, adapt_convert.plan):
        with pytest.raises(AdaptError, match=r"^--calib: .*take the adapter out first: adapt-convert delta BASE \S+shared --task NAME$"):
            make(shared / "base", shared / "shared", task="lora1", calib="self")


MODULE = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, Any] = {
    "no U": (lambda t: t.pop(f"U.{MODULE}"), None),
    "no V": (lambda t: t.pop(f"V.{MODULE}"), None),
    "a core of another size": (lambda t: t.update({f"1.core.{MODULE}": torch.zeros(1, 1)}), None),
    "a core of no task": (lambda t: t.update({f"4.core.{MODULE}": t[f"1.core.{MODULE}"].clone()}), None),
    "integers": (lambda t: t.update({f"U.{MODULE}": t[f"U.{MODULE}"].int()}), None),
    "another tensor": (lambda t: t.update({"lora_A.weight": torch.zeros(2, 2)}), None),
    "another version": (None, {"version": 2}),
    "tasks that are no list": (None, {"tasks": "lora1"}),
    "no tasks": (None, {"tasks": []}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused(damage: str, shared: Path, tmp_path: Path) -> None:
    change, entries = DAMAGES[damage]
    tensors = load_file(shared / "shared" / "shared_lora.safetensors")
    config = json.loads((shared / "shared" / "shared_lora_config.json").read_text())
    if change:
        change(tensors)
    save_file(tensors, tmp_path / "shared_lora.safetensors")
    (tmp_path / "shared_lora_config.json").write_text(json.dumps(config | (entries or {})))
    with pytest.raises(AdaptError):
        adapt_convert.convert(shared / "base", tmp_path, task="lora1")


def test_a_shared_lora_of_another_base_is_refused_and_leaves_the_model_alone(shared: Path, pairs: Any) -> None:
    model = pairs("mistral").load(pairs("mistral").base)
    before = dict(model.named_modules())
    with pytest.raises(AdaptError, match="does not have"):
        adapt_convert.load(model, shared / "shared")
    assert dict(model.named_modules()) == before
