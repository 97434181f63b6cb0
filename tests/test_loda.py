"""LoDA from checkpoint to checkpoint: errors and MACs as reported, recomputed from the files; what it can be made from; refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import adapt_convert
from adapt_convert import AdaptError
from adapt_convert.cli import main
from adapt_convert.convert.calibration.texts import read_text
from adapt_convert.convert.options import Options
from adapt_convert.formats.hub import prepare
from adapt_convert.formats.location import locate
from adapt_convert.formats.loda import LodaMatrix, read_loda

RANK = 4
TOKENS = 2048
VARIANTS: dict[str, dict[str, Any]] = {
    "loda": {},
    "loda+": {},
    "r-loda": {"base_rank": 6},
    "r-loda+": {"base_rank": 6},
    "s-loda": {"keep": 0.4},
    "s-loda+": {"keep": 0.4},
}
OTHERS = "embed_tokens,lm_head,gate_proj,up_proj,o_proj"  # left out where fewer matrices show as much


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of a Markov chain: each token has a few likely successors."""
    draw = torch.Generator().manual_seed(0)
    odds = torch.rand(96, 96, generator=draw) ** 8
    odds[:, :3] = 0
    rows = torch.full((24, 1), 3)
    for _ in range(127):
        rows = torch.cat([rows, torch.multinomial(odds[rows[:, -1]], 1, generator=draw)], dim=1)
    path = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    return path


def convert(pair: Any, text: Path, out: Path, to: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    options = {"rank": RANK, "exclude": OTHERS, "calib": text, "calib_tokens": TOKENS} | VARIANTS[to] | options
    adapt_convert.convert(pair.base, pair.ft, to=to, **options).save(out)
    return out, json.loads((out / "conversion.json").read_text())


def heldout_inputs(pair: Any, text: Path) -> dict[str, torch.Tensor]:
    """What every linear layer of the fine-tune reads on the rows that calibration holds out, by hooks of our own."""
    model = pair.load(pair.ft)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2)))
    split = read_text(str(text), TOKENS, "causal", model.config.to_dict(), [], 0)
    with torch.no_grad():
        for batch in split.heldout:
            model(**batch.inputs)
    return {name: torch.cat(x).double() for name, x in seen.items()}


def outputs(x: torch.Tensor, m: LodaMatrix) -> torch.Tensor:
    """f(x), the norm and LeakyReLU written out."""

    def act(u: torch.Tensor) -> torch.Tensor:
        u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.where(u > 0, u, 0.8 * u)

    z = x @ m.A.double().T
    if m.f1 is None:
        return z @ m.B.double().T
    lifted = act(z @ m.f1[0].double().T) @ m.f1[1].double().T @ m.B.double().T
    return z @ m.B.double().T + lifted + (m.f2.double() * act(lifted) if m.f2 is not None else 0.0)


@pytest.mark.parametrize("to", ["loda", "loda+", "r-loda", "s-loda+"])
def test_errors_are_those_of_the_written_files_and_never_above_a_loras(
    pairs: Callable[[str], Any], text: Path, tmp_path: Path, to: str
) -> None:
    pair = pairs("llama")
    out, report = convert(pair, text, tmp_path / "out", to)
    base, ft = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors")
    inputs, adapter, rows = heldout_inputs(pair, text), read_loda(locate(out)), report["loda"]["matrices"]
    assert len(rows) == len(adapter.matrices) == 8
    for module, m in adapter.matrices.items():
        x, weight, wanted = inputs[module], base[f"{module}.weight"].double(), ft[f"{module}.weight"].double()
        change = (x @ (wanted - weight).T).square().sum()
        if m.base is not None:
            weight = m.base.B.double() @ m.base.A.double()
        if m.keep is not None:
            weight = weight * m.keep
        replaced = m.base is not None or m.keep is not None
        assert replaced == (to[0] in "rs" and module.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj"))
        error = (x @ (wanted - weight).T - outputs(x, m)).square().sum() / change
        u, s, vt = torch.linalg.svd(wanted - weight)
        lora = (x @ (wanted - weight - (u[:, :RANK] * s[:RANK]) @ vt[:RANK]).T).square().sum() / change
        assert float(error) == pytest.approx(rows[module]["error"], rel=1e-3)
        assert float(lora) == pytest.approx(rows[module]["lora_error"], rel=1e-2)
        assert float(error) <= float(lora) * (1 + 1e-4)
        assert rows[module]["least_error"] <= rows[module]["error"]
        captured = report["tensors"][f"{module}.weight"]["captured_energy"]
        assert captured == pytest.approx(1 - rows[module]["error"], abs=1e-9)
    assert any(row["least_error"] < 0.99 * row["lora_error"] for row in rows.values())
    kinds = [row["kind"] for row in rows.values()]
    assert (set(kinds) == {"plain"}) == (report["calibration"]["chosen"] == "data-free")
    assert set(kinds) <= {"plain", "projected", *(["f1+f2"] if to.endswith("+") else [])}


@pytest.mark.parametrize(("to", "targets"), [("loda", ""), ("s-loda", ""), ("r-loda+", "q_proj,down_proj")])
def test_macs_are_those_of_the_files(pairs: Callable[[str], Any], text: Path, tmp_path: Path, to: str, targets: str) -> None:
    """Counted from the tensors on disk: every entry of a matrix that multiplies an activation is one."""
    pair = pairs("llama")
    out, report = convert(pair, text, tmp_path / "out", to, target_modules=targets)
    held = {key.removeprefix("base_model.model."): value for key, value in load_file(out / "adapter_model.safetensors").items()}
    modules = {key.removesuffix(".lora_A.weight") for key in held if key.endswith(".lora_A.weight")}
    total = lora = whole = 0
    for module in modules:
        A, B = held[f"{module}.lora_A.weight"], held[f"{module}.lora_B.weight"]
        dense = len(B) * A.shape[1]
        weight = dense
        if f"{module}.loda_base_A.weight" in held:
            weight = held[f"{module}.loda_base_A.weight"].numel() + held[f"{module}.loda_base_B.weight"].numel()
        if f"{module}.loda_keep" in held:
            weight = sum(int(byte).bit_count() for byte in held[f"{module}.loda_keep"])
            assert weight == round(0.4 * dense)
        inner = sum(held[key].numel() for key in held if key.startswith(f"{module}.loda_f1"))
        again = B.numel() if f"{module}.loda_f2.weight" in held else 0
        total += weight + A.numel() + B.numel() + inner + again
        lora, whole = lora + dense + A.numel() + B.numel(), whole + dense
    found = report["loda"]
    assert (found["macs_per_token"], found["macs_per_token_of_lora"], found["macs_per_token_of_base"]) == (total, lora, whole)
    assert (total < lora) == (to[0] in "rs")


def test_the_more_of_a_weight_stays_the_nearer_to_the_fine_tune(make_pair: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    """In the outputs of q, k and v, the only matrices of this fine-tune that changed; and `unload` leaves the base."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))

    pair = make_pair(tmp_path, "llama", change)
    captured = []
    for keep in (0.2, 0.9):
        out, report = convert(pair, text, tmp_path / str(keep), "s-loda", keep=keep)
        captured.append(report["captured_energy"])
        model = adapt_convert.load(pair.load(pair.base), out)
        assert not torch.equal(pair.logits(model), pair.logits(pair.load(pair.base)))
        assert torch.equal(pair.logits(adapt_convert.unload(model)), pair.logits(pair.load(pair.base)))
    assert captured[0] < captured[1] < 1


def test_full_rank_is_the_fine_tune(pairs: Callable[[str], Any], text: Path, tmp_path: Path) -> None:
    """Also on a base that was pruned: the adapter absorbs all of its error, and what is no matrix is stored exactly."""
    pair = pairs("llama")
    for to in ("loda+", "s-loda"):
        out, report = convert(pair, text, tmp_path / to, to, rank=64, exclude="")
        assert report["captured_energy_of_all_changes"] == pytest.approx(1, abs=1e-6)
        logits = pair.logits(adapt_convert.load(pair.load(pair.base), out))
        torch.testing.assert_close(logits, pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_other_layouts_and_biases(make_pair: Callable[..., Any], text: Path, tmp_path: Path, name: str) -> None:
    """GPT-2 stores its weights `(in, out)` and q, k and v in one; Qwen2 has changed biases on them."""
    sizes = {"n_positions": 128} if name == "gpt2" else {}
    pair = make_pair(tmp_path, name, None, **sizes)
    out, report = convert(pair, text, tmp_path / "r", "r-loda", rank=96, exclude="")
    assert report["captured_energy_of_all_changes"] == pytest.approx(1, abs=1e-6)
    replaced = {module.rsplit(".", 1)[-1] for module, row in report["loda"]["matrices"].items() if "base_rank" in row}
    assert replaced == ({"c_attn"} if name == "gpt2" else {"q_proj", "k_proj", "v_proj"})
    logits = pair.logits(adapt_convert.load(pair.load(pair.base), out))
    torch.testing.assert_close(logits, pair.logits(pair.load(pair.ft)), atol=5e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making
def test_a_lora_is_a_source_too(pairs: Callable[[str], Any], text: Path, tmp_path: Path) -> None:
    pair = pairs("llama")
    model = peft.get_peft_model(pair.load(pair.base), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for seed, (key, parameter) in enumerate(model.named_parameters()):
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(tmp_path / "lora")
    expected = pair.logits(model.eval())
    for to in ("loda", "s-loda"):
        out, _ = convert(type(pair)(pair.base, tmp_path / "lora", pair.model_class, pair.inputs), text, tmp_path / to, to, rank=32)
        torch.testing.assert_close(pair.logits(adapt_convert.load(pair.load(pair.base), out)), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("to", ["loda", "r-loda+"])
def test_refining_trains_f1_and_what_is_reported_is_what_came_of_it(
    pairs: Callable[[str], Any], text: Path, tmp_path: Path, own_cache: Path, to: str
) -> None:
    pair = pairs("llama")
    out, report = convert(pair, text, tmp_path / "out", to, refine=12)
    kl = report["calibration"]["candidates"]
    assert kl["refined"] < min(kl["data-free"], kl["fitted"])
    assert report["calibration"]["chosen"] == "refined"
    adapter, rows = read_loda(locate(out)), report["loda"]["matrices"]
    base, ft, inputs = load_file(pair.base / "model.safetensors"), load_file(pair.ft / "model.safetensors"), heldout_inputs(pair, text)
    for module, m in adapter.matrices.items():
        assert m.f1 is not None
        assert m.f1[1].any()
        assert (m.f2 is not None) == to.endswith("+")
        weight, wanted, x = base[f"{module}.weight"].double(), ft[f"{module}.weight"].double(), inputs[module]
        runs = weight if m.base is None else m.base.B.double() @ m.base.A.double()
        error = (x @ (wanted - runs).T - outputs(x, m)).square().sum() / (x @ (wanted - weight).T).square().sum()
        assert float(error) == pytest.approx(rows[module]["error"], rel=1e-3)
        out_features, in_features = weight.shape
        products = RANK * (in_features + out_features * (2 if to.endswith("+") else 1)) + 2 * RANK**2
        assert rows[module]["macs"] == products + (weight.numel() if m.base is None else 6 * (in_features + out_features))
    assert report["loda"]["macs_per_token"] == sum(row["macs"] for row in rows.values())
    logits = pair.logits(adapt_convert.load(pair.load(pair.base), out))
    assert torch.isfinite(logits).all()


def test_the_command_line_from_conversion_to_push(pairs: Callable[[str], Any], text: Path, tmp_path: Path) -> None:
    pair, runner = pairs("llama"), CliRunner()

    def run(*arguments: Any) -> Any:
        return runner.invoke(main, [str(argument) for argument in arguments])

    for name in ("one", "two"):
        options = ["--rank", RANK, "--keep", 0.5, "--calib", text, "--calib-tokens", TOKENS, "--exclude", OTHERS]
        result = run("delta", pair.base, pair.ft, "--to", "s-loda", *options, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert "MACs per token" in result.output
    assert "of the outputs of the adapted matrices" in " ".join(result.stdout.split())
    assert "of everything that changed" not in result.stdout
    one = tmp_path / "one"
    assert (one / "adapter_model.safetensors").read_bytes() == (tmp_path / "two" / "adapter_model.safetensors").read_bytes()
    card = (one / "README.md").read_text()
    assert "adapt_convert.load" in card
    assert "without training data" not in card
    shown = json.loads(run("inspect", one, "--json").stdout)
    assert (shown["kind"], shown["variant"], shown["rank"], shown["keep"]) == ("LODA", "s-loda", RANK, 0.5)
    planned = json.loads(run("inspect", pair.base, pair.ft, "--to", "s-loda", *options, "--json").stdout)
    assert planned["predicted_bytes"] == pytest.approx((one / "adapter_model.safetensors").stat().st_size, rel=0.2)
    for command in (["merge", pair.base, one], ["delta", pair.base, one], ["bundle", pair.base, one], ["inspect", pair.base, one]):
        refused = run(*command, *([] if command[0] == "inspect" else ["-o", tmp_path / "no"]))
        assert (refused.exit_code, (tmp_path / "no").exists()) == (1, False), command
        assert "is a LoDA, which is no change of weights: it can be neither merged nor converted, only run" in refused.output
        assert refused.output.count("\n") == 1
    sent = prepare(one, "org/name").files
    assert str(tmp_path) not in "".join(content.decode() for content in sent.values() if isinstance(content, bytes))
    assert str(text) not in sent["conversion.json"].decode()  # type: ignore[union-attr]
    pushed = run("push", one, "org/name", "--dry-run")
    assert pushed.exit_code == 0, pushed.output
    assert "adapter_model.safetensors" in pushed.output


def test_validate_runs_it(pairs: Callable[[str], Any], text: Path, tmp_path: Path) -> None:
    pair = pairs("llama")
    good, _ = convert(pair, text, tmp_path / "good", "loda", rank=32, exclude="")
    bad, _ = convert(pair, text, tmp_path / "bad", "s-loda", keep=0.05, rank=1)
    result = adapt_convert.validate(pair.base, pair.ft, good, bad, token_ids=text, speed=False)
    assert [row.passed for row in result.candidates] == [True, False]
    assert result.candidates[0].contender.kind == "loda"
    assert result.candidates[0].fidelity.recovered == pytest.approx(1, abs=1e-3)
    assert "is a LoDA" in (result.candidates[0].holdings.note or "")  # type: ignore[union-attr]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"to": "loda"}, r"--to loda is fitted to activations: give --calib FILE, or --calib self; without text use --to lora"),
    ({"to": "r-loda", "calib": "x"}, r"--to r-loda replaces weights: say with --base-rank by how much"),
    ({"to": "s-loda+", "calib": "x"}, r"--to s-loda\+ replaces weights: say with --keep by how much"),
    ({"to": "lora", "keep": 0.5}, r"--keep is an option of --to s-loda"),
    ({"to": "loda", "calib": "x", "base_rank": 4}, r"--base-rank is an option of --to r-loda"),
    ({"to": "r-loda", "calib": "x", "base_rank": 0}, r"--base-rank 0: must be a whole number of at least 1"),
    ({"to": "r-loda", "calib": "x", "base_rank": "four"}, r"--base-rank four: must be a whole number"),
    ({"to": "s-loda", "calib": "x", "keep": 1}, r"--keep 1\.0: must be a share of the entries, above 0 and below 1"),
    ({"to": "s-loda", "calib": "x", "keep": float("nan")}, r"--keep nan: must be a share"),
    ({"to": "loda", "calib": "x", "energy": 0.9}, r"--to loda takes --rank"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message) as caught:
        Options(**options)
    assert "\n" not in str(caught.value)


def test_a_rank_that_saves_nothing_is_refused(pairs: Callable[[str], Any], text: Path, tmp_path: Path) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match=r"--base-rank 16: saves nothing on any of the targeted matrices"):
        convert(pair, text, tmp_path / "out", "r-loda", base_rank=16)
    assert not (tmp_path / "out").exists()
    _, report = convert(pair, text, tmp_path / "some", "r-loda", base_rank=11)  # k and v are 16 x 32, q is 32 x 32
    rows = report["loda"]["matrices"]
    assert {module.rsplit(".", 1)[-1] for module, row in rows.items() if "base_rank" in row} == {"q_proj"}
