"""`--for`: what is written for a server is loaded by its rules and is, matrix by matrix, what PEFT runs; what is left out is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import save_pair
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from servers import SERVERS, Refused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

from adapt_convert import AdaptError, batch, convert, inspect, lint, merge
from adapt_convert.cli import main
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.profiles import PROFILES, Profile


def peft_deltas(pair: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT itself adds to every matrix, `(out, in)` float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(pair.load(pair.base), adapter)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").detach().double()
            found[name] = delta.T if isinstance(module, peft.tuners.lora.Embedding) and delta.shape != module.weight.shape else delta
    return found


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same changes; a module that is not there changes nothing."""
    assert any(value.any() for value in expected.values())
    for module in {*given, *expected}:
        theirs = expected.get(module, torch.zeros((), dtype=torch.float64))
        ours = given.get(module, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(*torch.broadcast_tensors(ours, theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "llama-tied"])
def test_a_server_runs_it_as_peft_does(name: str, server: str, pairs: Any, tmp_path: Path) -> None:
    pair = pairs(name)
    model_type = name.removesuffix("-tied")
    conversion = convert(pair.base, pair.ft, profile=server, energy=0.7)
    conversion.save(tmp_path / "out")
    assert_same(SERVERS[server](tmp_path / "out", model_type), peft_deltas(pair, tmp_path / "out"))
    assert lint(tmp_path / "out", server) == []
    plain = convert(pair.base, pair.ft, energy=0.7).save(tmp_path / "plain")
    with pytest.raises(Refused):  # whole tensors and, in Qwen, biases
        SERVERS[server](plain, model_type)
    assert lint(plain, server) != []


@pytest.mark.parametrize("server", SERVERS)
def test_what_is_left_out_is_measured(server: str, pairs: Any, tmp_path: Path) -> None:
    """The share captured of all changes, worked out from the files alone."""
    pair = pairs("qwen2")
    conversion = convert(pair.base, pair.ft, profile=server, rank=4)
    conversion.save(tmp_path / "out")
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    held = SERVERS[server](tmp_path / "out", "qwen2")
    total = lost = dropped = 0.0
    for key, value in ft.items():
        change = value.double() - base[key].double()
        delta = held.get(key.removesuffix(".weight"))
        total += float(change.square().sum())
        lost += float((change - (delta if delta is not None else 0)).square().sum())
        dropped += float(change.square().sum()) if delta is None else 0.0
    report = conversion.report
    assert report["captured_energy_of_all_changes"] == pytest.approx(1 - lost / total, rel=1e-5)
    assert report["profile"]["left_out_energy"] == pytest.approx(dropped / total, rel=1e-5)
    title = PROFILES[server].title
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"):
        assert report["tensors"][name]["status"] == "dropped"
        assert report["tensors"][name]["reason"].startswith(f"{title} {'has no LoRA of biases' if 'bias' in name else 'loads no whole'}")
    with pytest.raises(AdaptError, match=rf"--strict: .*\({title} "):
        convert(pair.base, pair.ft, profile=server, rank=4, strict=True)


def one_matrix(model: Any) -> None:
    for layer, name in ((0, "q_proj"), (1, "k_proj")):
        weight = model.model.layers[layer].self_attn.get_submodule(name).weight
        weight += 0.1 * torch.randn_like(weight)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight += 0.1 * torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))


def test_matrices_that_belong_together_come_together(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", one_matrix)
    written = {}
    for consumer in ("peft", "vllm", "sglang"):
        conversion = convert(pair.base, pair.ft, profile=consumer, rank=8)
        conversion.save(tmp_path / consumer)
        config = json.loads((tmp_path / consumer / "adapter_config.json").read_text())
        written[consumer] = (conversion.report["profile"]["filled_with_zeros"], config["target_modules"], config["rank_pattern"])
    assert written["peft"][:1] == (0,)  # an unchanged matrix has no factors
    assert len(written["peft"][2]) == 1  # of the matrix that changed by rank 1
    assert written["vllm"][::2] == (0, {})  # it takes a matrix by itself
    assert written["sglang"] == (7, ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"], {})
    expected = peft_deltas(pair, tmp_path / "peft")
    assert_same(SERVERS["vllm"](tmp_path / "vllm", "llama"), expected)
    assert_same(SERVERS["sglang"](tmp_path / "sglang", "llama"), expected)
    with pytest.raises(Refused, match="v_proj"):
        SERVERS["sglang"](tmp_path / "vllm", "llama")
    assert any("v_proj adapted beside" in str(finding) for finding in lint(tmp_path / "vllm", "sglang"))


def one_expert(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj[2] += 0.1 * torch.randn_like(experts.down_proj[2])
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight += 0.01 * torch.randn_like(weight)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_all_experts_of_a_layer_come_together(server: str, tmp_path: Path) -> None:
    """And those that PEFT knows in a stack alone are left out, with what they had changed."""
    pair = save_pair(tmp_path, *tiny("qwen3_moe"), one_expert)
    conversion = convert(pair.base, pair.ft, profile=server, rank=4)
    conversion.save(tmp_path / "out")
    held = SERVERS[server](tmp_path / "out", "qwen3_moe")
    assert {name for name in held if ".experts." in name} >= {
        f"model.layers.1.mlp.experts.{number}.{name}" for number in range(4) for name in ("gate_proj", "up_proj", "down_proj")
    }
    base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
    name = "model.layers.1.mlp.experts.2.down_proj"
    change = (ft[f"{name}.weight"] - base[f"{name}.weight"]).double()
    error = float((change - held[name]).square().sum() / change.square().sum())
    assert conversion.report["tensors"][f"{name}.weight"]["captured_energy"] == pytest.approx(1 - error, abs=1e-5)
    assert lint(tmp_path / "out", server) == []
    tensors = {key: value.clone() for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    less = "experts.3.up" if server == "vllm" else "gate_proj"
    save_file({key: value for key, value in tensors.items() if less not in key}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(Refused):
        SERVERS[server](tmp_path / "out", "qwen3_moe")
    said = "wants all experts of a layer adapted, and not model" if server == "vllm" else "adapts no experts without gate_proj, and so not"
    assert any(said in str(finding) for finding in lint(tmp_path / "out", server))
    stacked = save_pair(tmp_path / "stacked", *tiny("qwen2_moe"), one_expert)
    with pytest.raises(AdaptError, match=r"takes no experts of a qwen2_moe in a stack.*layers\.1\.mlp\.experts\.2\.down_proj"):
        convert(stacked.base, stacked.ft, profile=server, rank=4)


def test_tables_go_where_the_server_looks_for_them(pairs: Any, tmp_path: Path) -> None:
    """vLLM's Mistral adapts none, though its Llama does; there a shared one is held twice, for the input and for the output."""
    for name, held in (("llama", ["embed_tokens", "lm_head"]), ("llama-tied", ["embed_tokens", "lm_head"]), ("mistral", [])):
        pair = pairs(name)
        conversion = convert(pair.base, pair.ft, profile="vllm", rank=32, target_modules="all-linear,embed_tokens")
        conversion.save(tmp_path / name)
        given = SERVERS["vllm"](tmp_path / name, name.removesuffix("-tied"))
        assert [table for table in ("embed_tokens", "lm_head") if any(module.endswith(table) for module in given)] == held
        assert lint(tmp_path / name, "vllm") == []
        if held:
            base, ft = (load_file(path / "model.safetensors") for path in (pair.base, pair.ft))
            change = (ft["model.embed_tokens.weight"] - base["model.embed_tokens.weight"]).double()
            torch.testing.assert_close(given["model.embed_tokens"], change.T, rtol=1e-4, atol=1e-4)
            if name == "llama-tied":
                torch.testing.assert_close(given["lm_head"], change, rtol=1e-4, atol=1e-4)
                assert conversion.report["captured_energy_of_all_changes"] > 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 5))
def test_padding_changes_nothing(rows: int, columns: int, rank: int, more: int) -> None:
    delta = LowRankDelta(torch.randn(rows, rank), torch.randn(rank, columns))
    padded = delta.padded(rank + more)
    assert padded.rank == rank + more
    torch.testing.assert_close(padded.dense(), delta.dense())


def test_ranks_stay_within_the_limit(pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = pairs("llama")
    monkeypatch.setitem(PROFILES, "vllm", Profile("vllm", "vLLM", "0.32", "peft", "x", "", max_rank=6, ranks=(1, 6), scale="r"))
    conversion = convert(pair.base, pair.ft, profile="vllm", energy=0.99, exclude="embed_tokens,lm_head")
    conversion.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6
    assert conversion.report["captured_energy"] < 0.9  # measured on what was written
    with pytest.raises(AdaptError, match="--rank 7: vLLM takes at most 6"):
        convert(pair.base, pair.ft, profile="vllm", rank=7)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("llama", {"profile": "ollama"}, "--for ollama: unknown consumer; choose one of peft, vllm, sglang"),
    "no LoRA": ("llama", {"profile": "vllm", "to": "lorta"}, "--for vllm: vLLM takes a LoRA; use --to lora"),
    "budget": ("llama", {"profile": "sglang", "budget": "1MB"}, "SGLang wants one for all: give --rank"),
    "rank": ("llama", {"profile": "vllm", "rank": 513}, "--rank 513: vLLM takes at most 512"),
    "conv1d": ("gpt2", {"profile": "sglang"}, r"SGLang has no LoRA for a gpt2, whose matrices are stored \(in, out\)"),
    "a type without": ("gpt2", {"profile": "vllm"}, "vLLM has no LoRA for a gpt2; serve the merged model"),
    "other names": ("bert", {"profile": "sglang"}, "no matrix is left to convert"),
    "nothing left": ("llama", {"profile": "tensorrt-llm", "target_modules": "lm_head"}, "no matrix is left to convert"),
    "mostly left out": (
        "llama",
        {"profile": "vllm", "target_modules": "q_proj"},
        None,  # what the user leaves to the base by --target-modules is no loss of the consumer's
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, pairs: Any) -> None:
    name, options, message = REFUSED[case]
    pair = pairs(name)
    if message is None:
        convert(pair.base, pair.ft, **options)
        return
    with pytest.raises(AdaptError, match=message):
        convert(pair.base, pair.ft, **options)


def embeddings_above_all(model: Any) -> None:
    model.model.embed_tokens.weight += torch.randn_like(model.model.embed_tokens.weight)
    model.model.layers[0].self_attn.q_proj.weight += 0.01


def test_an_adapter_without_most_of_the_change_is_refused(make_pair: Any, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", embeddings_above_all)
    with pytest.raises(AdaptError, match=r"100% of the change would be left out.*--target-modules all-linear,embed_tokens factors it"):
        convert(pair.base, pair.ft, profile="vllm")
    convert(pair.base, pair.ft, profile="peft")
    given = convert(pair.base, pair.ft, profile="vllm", exclude="embed_tokens")
    assert given.report["profile"]["left_out_energy"] == 0.0  # the user has said so
    assert given.report["captured_energy_of_all_changes"] < 0.01
    whole = convert(pair.base, pair.ft, profile="vllm", rank=32, target_modules="all-linear,embed_tokens")
    whole.save(tmp_path / "out")
    assert whole.report["captured_energy_of_all_changes"] > 0.999
    assert_same(SERVERS["vllm"](tmp_path / "out", "llama"), _transposed_tables(peft_deltas(pair, tmp_path / "out")))


def _transposed_tables(deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The server multiplies `B (hidden, r)` and `A (r, vocabulary)` of a table, which is its change transposed."""
    return {name: delta.T if name.endswith("embed_tokens") else delta for name, delta in deltas.items()}


def test_added_tokens_are_refused(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("llama")
    tensors = load_file(pair.ft / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(4, 32)])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((pair.ft / "config.json").read_text())
    for consumer in ("vllm", "sglang", "tensorrt-llm", "llama.cpp"):
        with pytest.raises(AdaptError, match=r"cannot add the 4 rows by which lm_head\.weight outgrows the base"):
            convert(pair.base, tmp_path, profile=consumer)
        with pytest.raises(AdaptError, match="cannot add the 4 rows"):
            inspect(pair.base, tmp_path, profile=consumer)
        convert(pair.base, tmp_path, profile=consumer, exclude="embed_tokens,lm_head")


def test_the_command_says_what_it_left_out(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("qwen2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(pair.base)
    (tmp_path / "ft").symlink_to(pair.ft)
    dry = CliRunner().invoke(main, ["delta", "base", "ft", "--for", "vllm", "--dry-run"])
    assert "note: vLLM adapts no output head of a qwen2: lm_head.weight" in dry.stdout
    done = CliRunner().invoke(main, ["delta", "base", "ft", "--for", "vllm", "--rank", "12"])
    assert done.exit_code == 0, done.output
    assert "written to ft-lora-r12-vllm" in done.stdout
    assert "start it with --enable-lora --max-lora-rank 16" in done.stdout  # the smallest size that holds rank 12
    report = json.loads((tmp_path / "ft-lora-r12-vllm" / "conversion.json").read_text())
    assert f"rank 12, {report['profile']['left_out_energy']:.4%} of the change left out" in done.stdout
    assert "for vLLM 0.32, started with `--enable-lora --max-lora-rank 16`" in (tmp_path / "ft-lora-r12-vllm" / "README.md").read_text()
    assert CliRunner().invoke(main, ["lint", "ft-lora-r12-vllm", "--for", "vllm"]).exit_code == 0


def test_a_batch_writes_for_consumers_too(pairs: Any, tmp_path: Path) -> None:
    """And to the same bytes as a conversion by itself."""
    pair = pairs("llama")
    jobs = [{"source": str(pair.ft), "profile": profile, "rank": 4} for profile in ("vllm", "llama.cpp")]
    result = batch({"defaults": {"base": str(pair.base)}, "jobs": jobs}, tmp_path / "out")
    assert [row["output"] for row in result["jobs"]] == ["ft-lora-r4-vllm", "ft-lora-r4-llama.cpp"]
    for profile, file in (("vllm", "adapter_model.safetensors"), ("llama.cpp", "adapter_model.gguf")):
        alone = convert(pair.base, pair.ft, profile=profile, rank=4).save(tmp_path / profile)
        assert (tmp_path / "out" / f"ft-lora-r4-{profile}" / file).read_bytes() == (alone / file).read_bytes()
    again = batch({"defaults": {"base": str(pair.base)}, "jobs": jobs}, tmp_path / "out")
    assert all(row["skipped"] for row in again["jobs"])
    with pytest.raises(AdaptError, match="nowhere: unknown consumer"):
        batch({"defaults": {"base": str(pair.base)}, "jobs": [{"source": str(pair.ft), "profile": "nowhere"}]}, tmp_path / "more")


def test_the_table_that_peft_saves_beside_a_lora_of_it_is_the_bases(pairs: Any, tmp_path: Path) -> None:
    """`save_pretrained` writes it whether or not it was resized; only one of another value is a change of its own."""
    pair = pairs("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
        peft.get_peft_model(pair.load(pair.base), config).save_pretrained(tmp_path / "lora")
    path, key = tmp_path / "lora" / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # the file is written over
    expected = {name: d.T if name.endswith("embed_tokens") else d for name, d in peft_deltas(pair, tmp_path / "lora").items()}
    for case, table in {"as saved": tensors[key], "in half precision": tensors[key].bfloat16()}.items():
        save_file(tensors | {key: table}, path, metadata={"format": "pt"})
        conversion = convert(pair.base, tmp_path / "lora", profile="vllm")
        assert conversion.report["tensors"]["model.embed_tokens.weight"]["status"] == "factored"
        conversion.save(tmp_path / case)
        assert_same(SERVERS["vllm"](tmp_path / case, "llama"), expected)
    resized = torch.cat([tensors[key], torch.ones(2, tensors[key].shape[1])])
    save_file(tensors | {key: resized, **_rows_added(tensors)}, path, metadata={"format": "pt"})
    report = convert(pair.base, tmp_path / "lora").report
    assert report["tensors"]["model.embed_tokens.weight"]["status"] == "exact"
    changed = tensors[key].clone()
    changed[5] += 1
    save_file(tensors | {key: changed}, path, metadata={"format": "pt"})
    merge(pair.base, tmp_path / "lora", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(merged.double(), changed.double() + expected["model.embed_tokens"].T, rtol=1e-5, atol=1e-5)


def test_the_predicted_size_counts_padding(pairs: Any, tmp_path: Path) -> None:
    """Ranks differ with the matrices' sizes, and one server wants them equal."""
    pair = pairs("llama")
    planned = inspect(pair.base, pair.ft, profile="sglang", energy=1.0)["predicted_bytes"]
    written = convert(pair.base, pair.ft, profile="sglang", energy=1.0).save(tmp_path / "out") / "adapter_model.safetensors"
    assert planned == pytest.approx(written.stat().st_size, rel=0.05)


def _rows_added(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first factor of the embedding for two more tokens."""
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    return {key: torch.cat([tensors[key], torch.ones(len(tensors[key]), 2)], dim=1)}
