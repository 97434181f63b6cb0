"""The forms in which a checkpoint comes: files, shards, pickles, names, ties, heads, and the Hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.batch.sources import find_sources
from adapt_convert.formats import checkpoint
from adapt_convert.formats.checkpoint import Checkpoint, TensorStore, hashing
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import is_hub_id, locate

State = dict[str, torch.Tensor]


def state_of(directory: Path) -> State:
    return load_file(directory / "model.safetensors")


def copy_config(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def save_state(source: Path, target: Path, state: State, **changes: Any) -> Path:
    copy_config(source, target, **changes)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def halves(state: State, files: tuple[str, str], save: Callable[[State, Path], None], target: Path, index: str) -> None:
    names = list(state)
    parts = dict(zip(files, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save({name: state[name] for name in part}, target / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (target / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
ONE_BIN = "pytorch_model.bin"
LAYOUTS: dict[str, Callable[[State, Path], Path | None]] = {
    "safetensors": lambda s, d: save_file(s, d / "model.safetensors"),
    "one file of another name": lambda s, d: save_file(s, d / "weights.safetensors") or d / "weights.safetensors",
    "sharded": lambda s, d: halves(s, SHARDS, save_file, d, "model.safetensors.index.json"),
    "the index itself": lambda s, d: halves(s, SHARDS, save_file, d, "model.safetensors.index.json") or d / "model.safetensors.index.json",
    "bin": lambda s, d: torch.save(s, d / ONE_BIN),
    "bin file": lambda s, d: torch.save(s, d / ONE_BIN) or d / ONE_BIN,
    "bin of parameters": lambda s, d: torch.save({n: torch.nn.Parameter(t) for n, t in s.items()}, d / ONE_BIN),
    "bin in state_dict": lambda s, d: torch.save({"epoch": 3, "state_dict": s}, d / ONE_BIN),
    "bin, not contiguous": lambda s, d: torch.save({n: t.T.contiguous().T if t.ndim == 2 else t for n, t in s.items()}, d / ONE_BIN),
    "bin, views of one storage": lambda s, d: torch.save(views_of_one_storage(s), d / ONE_BIN),
    "bin from before torch 1.6": lambda s, d: torch.save(s, d / ONE_BIN, _use_new_zipfile_serialization=False),
    "sharded bin": lambda s, d: halves(s, BIN_SHARDS, torch.save, d, "pytorch_model.bin.index.json"),
}


def views_of_one_storage(state: State) -> State:
    flat = torch.cat([t.reshape(-1) for t in state.values()])
    sizes = [t.numel() for t in state.values()]
    return {n: part.view(t.shape) for (n, t), part in zip(state.items(), flat.split(sizes), strict=True)}


@pytest.fixture(scope="module")
def plain_llama(pairs, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """The weights file and the report of the plainest layout: what every other layout has to give."""
    pair = pairs("llama")
    out = adapt_convert.convert(pair.base, pair.ft, rank=3).save(tmp_path_factory.mktemp("plain") / "out")
    return (out / "adapter_model.safetensors").read_bytes(), json.loads((out / "conversion.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_adapter(pairs, plain_llama, tmp_path: Path, layout: str) -> None:
    pair = pairs("llama")
    places = []
    for side in (pair.base, pair.ft):
        directory = copy_config(side, tmp_path / side.name)
        places.append(LAYOUTS[layout](state_of(side), directory) or directory)
    out = adapt_convert.convert(*places, rank=3).save(tmp_path / "out")
    weights, report = plain_llama
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    got = json.loads((out / "conversion.json").read_text())
    assert got["tensors"] == report["tensors"]
    for role in ("base", "source"):  # names the weights, not the files
        assert got["inputs"][role]["blake3"] == report["inputs"][role]["blake3"]


def test_content_hash_tells_weights_apart(pairs, tmp_path: Path) -> None:
    state = state_of(pairs("llama").base)
    name = "model.norm.weight"
    variants: dict[str, State] = {
        "value": state | {name: state[name] + 1},
        "dtype": state | {name: state[name].to(torch.float64)},
        "shape": state | {name: state[name].reshape(4, -1)},
        "name": {("renamed" if n == name else n): t for n, t in state.items()},
    }
    hashes = {Checkpoint(locate(pairs("llama").base)).store.content_hash()}
    for key, variant in variants.items():
        hashes.add(Checkpoint(locate(save_state(pairs("llama").base, tmp_path / key, variant))).store.content_hash())
    assert len(hashes) == 5


def test_shards_as_transformers_writes_them(pairs, plain_llama, tmp_path: Path) -> None:
    pair = pairs("llama")
    for side in (pair.base, pair.ft):
        pair.load(side).save_pretrained(tmp_path / side.name, max_shard_size="20KB")
        assert len(list((tmp_path / side.name).glob("model-*.safetensors"))) > 2
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=3).save(tmp_path / "out")
    assert (out / "adapter_model.safetensors").read_bytes() == plain_llama[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_half_precision(pairs, tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    pair = pairs("llama")
    states = [{n: t.to(dtype) for n, t in state_of(side).items()} for side in (pair.base, pair.ft)]
    for side, state in zip(("base", "ft"), states, strict=True):
        LAYOUTS[layout](state, copy_config(pair.base, tmp_path / side))
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=32, dtype="float32").save(tmp_path / "out")
    written = load_file(out / "adapter_model.safetensors")
    key = "model.layers.0.self_attn.q_proj"
    product = written[f"base_model.model.{key}.lora_B.weight"] @ written[f"base_model.model.{key}.lora_A.weight"]
    # The difference of the rounded values in float32: subtracting in `dtype` would be off by 1e-3.
    torch.testing.assert_close(product, states[1][f"{key}.weight"].float() - states[0][f"{key}.weight"].float(), atol=1e-6, rtol=1e-5)


def adapter_logits(pair, base: Path, adapter: Path, model_class: Any = None) -> torch.Tensor:
    model = (model_class or pair.model_class).from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pair.logits(peft.PeftModel.from_pretrained(model, adapter).eval())


def gpt2_hub_names(state: State) -> State:
    """The keys of the Hub's `gpt2`, with the constant masks it carries."""
    names = {name.removeprefix("transformer."): value for name, value in state.items()}
    return names | {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}


def with_lm_head(state: State) -> State:
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


GPT2_NAMES: dict[str, tuple[Callable[[State], State], Callable[[State], State]]] = {
    "both as on the Hub": (gpt2_hub_names, gpt2_hub_names),
    "base as on the Hub": (gpt2_hub_names, dict),
    "fine-tune as on the Hub": (dict, gpt2_hub_names),
    "fine-tune stores the tied head too": (dict, with_lm_head),
    "base stores the tied head too": (with_lm_head, dict),
    "Hub base, tied head in the fine-tune": (gpt2_hub_names, with_lm_head),
}


@pytest.mark.parametrize("case", GPT2_NAMES)
def test_gpt2_names(pairs, tmp_path: Path, case: str) -> None:
    pair = pairs("gpt2")
    changes = dict(zip((pair.base, pair.ft), GPT2_NAMES[case], strict=True))
    for side, change in changes.items():
        save_state(side, tmp_path / side.name, change(state_of(side)))
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=64).save(tmp_path / "out")
    report = json.loads((out / "conversion.json").read_text())
    lost = [name for name, row in report["tensors"].items() if row["status"] == "dropped"]
    assert all(name.endswith(".attn.bias") for name in lost)  # constants of the model, not weights
    assert report["captured_energy_of_all_changes"] > 1 - 1e-6
    expected = pair.logits(pair.load(pair.ft))
    torch.testing.assert_close(adapter_logits(pair, pair.base, out), expected, atol=2e-4, rtol=1e-4)
    adapt_convert.merge(tmp_path / "base", out, tmp_path / "merged")
    torch.testing.assert_close(pair.logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()), expected, atol=2e-4, rtol=1e-4)
    lorta = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", to="lorta", rank=2).save(tmp_path / "lorta")
    loaded = pair.logits(adapt_convert.load(pair.load(pair.base), lorta))
    adapt_convert.merge(tmp_path / "base", lorta, tmp_path / "merged lorta")
    torch.testing.assert_close(pair.logits(pair.load(tmp_path / "merged lorta")), loaded, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("old", [("base",), ("ft",), ("base", "ft")], ids="+".join)
def test_layer_norms_from_before_2020(pairs, tmp_path: Path, old: tuple[str, ...]) -> None:
    pair = pairs("bert")
    for side in (pair.base, pair.ft):
        state = state_of(side)
        if side.name in old:
            state = {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()
            }
            assert any(name.endswith("LayerNorm.gamma") for name in state)
        save_state(side, tmp_path / side.name, state)
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=64).save(tmp_path / "out")
    got = adapter_logits(pair, pair.base, out)
    torch.testing.assert_close(got, pair.logits(pair.load(pair.ft)), atol=2e-4, rtol=1e-4)


def bert_backbone(pairs, tmp_path: Path) -> Path:
    """A bare `BertModel` with the weights of the base, as BERT lies on the Hub: keys without `bert.`."""
    BertModel.from_pretrained(pairs("bert").base, add_pooling_layer=False).save_pretrained(tmp_path / "backbone")
    assert not any(name.startswith("bert.") for name in state_of(tmp_path / "backbone"))
    return tmp_path / "backbone"


@pytest.mark.parametrize("base_has_prefix", [True, False])
def test_a_classifier_that_is_new_in_the_fine_tune(pairs, tmp_path: Path, base_has_prefix: bool) -> None:
    pair = pairs("bert")
    base = pair.base if base_has_prefix else bert_backbone(pairs, tmp_path)
    torch.manual_seed(1)
    ft = BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    for parameter in ft.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ft.save_pretrained(tmp_path / "ft")
    out = adapt_convert.convert(base, tmp_path / "ft", rank=64).save(tmp_path / "out")
    statuses = {n: row["status"] for n, row in json.loads((out / "conversion.json").read_text())["tensors"].items()}
    assert statuses["classifier.weight"] == statuses["classifier.bias"] == "exact"
    # The head of a class that the base is not starts at random: the adapter has to bring it.
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    pooler = {n for n, _ in model.named_parameters() if "pooler" in n}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, out).eval()
    assert pooler <= set(statuses)
    torch.testing.assert_close(pair.logits(loaded), pair.logits(ft), atol=2e-4, rtol=1e-4)


def test_a_fine_tune_saved_as_bare_backbone(pairs, tmp_path: Path) -> None:
    pair = pairs("bert")
    BertModel.from_pretrained(pair.ft, add_pooling_layer=False).save_pretrained(tmp_path / "ft")
    out = adapt_convert.convert(pair.base, tmp_path / "ft", rank=64).save(tmp_path / "out")
    model = BertModel.from_pretrained(pair.base, add_pooling_layer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        expected = BertModel.from_pretrained(pair.ft, add_pooling_layer=False).eval()(**pair.inputs).last_hidden_state
        torch.testing.assert_close(loaded(**pair.inputs).last_hidden_state, expected, atol=2e-4, rtol=1e-4)


def put_into_cache(cache: Path, repo: str, directory: Path, commit: str) -> None:
    """The layout of huggingface_hub's cache: snapshots are links to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for file in directory.iterdir():
        shutil.copyfile(file, root / "blobs" / f"{commit}-{file.name}")
        (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{commit}-{file.name}")


def offline(cache: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # An address that refuses at once: whatever tries the network fails.
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "300"}
    command = [sys.executable, "-c", "from adapt_convert.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_hashing_ahead_finds_the_same_hash(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 1000)
    store = Checkpoint(locate(pairs("llama").base)).store
    with hashing(store):
        deadline = time.monotonic() + 60
        while len(store.known(store.infos)) < len(store.infos) and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(store.known(store.infos)) == len(store.infos)
    assert store.content_hash() == Checkpoint(locate(pairs("llama").base)).store.content_hash()
    assert store.reads == 0


@pytest.mark.parametrize("pieces", [0, 1, 7, 40])
def test_a_tensor_that_was_hashed_in_part_is_hashed_again(pairs, pieces: int) -> None:
    class Stop(threading.Event):
        left = pieces

        def is_set(self) -> bool:
            self.left -= 1
            return self.left < 0

    store, stop = Checkpoint(locate(pairs("llama").base)).store, Stop()
    for name in store.infos:
        store.hash_ahead(name, memoryview(bytearray(1000)), stop)
    assert len(store.known(store.infos)) < len(store.infos)
    assert store.content_hash() == Checkpoint(locate(pairs("llama").base)).store.content_hash()


def test_hashing_ahead_leaves_errors_to_who_reads(pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shutil.copytree(pairs("llama").base, tmp_path / "base")
    store = Checkpoint(locate(broken)).store
    os.truncate(store.files[0], 1000)  # of any tensor only the header is there
    ended, hash_ahead = threading.Event(), TensorStore.hash_ahead

    def watched(own: TensorStore, *arguments: Any) -> None:
        try:
            hash_ahead(own, *arguments)
        finally:
            ended.set()

    monkeypatch.setattr(TensorStore, "hash_ahead", watched)
    with hashing(store):
        assert ended.wait(60)
    with pytest.raises(AdaptError, match="cut short while being read"):
        store.content_hash()


def test_hub_ids_from_the_cache(pairs, plain_llama, tmp_path: Path) -> None:
    pair = pairs("llama")
    cache = tmp_path / "cache"
    put_into_cache(cache, "org/base", pair.base, "a" * 40)
    put_into_cache(cache, "org/ft", pair.ft, "b" * 40)
    done = offline(cache, tmp_path, "delta", "org/base", "org/ft", "--rank", "3")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "ft-lora-r3"
    assert (out / "adapter_model.safetensors").read_bytes() == plain_llama[0]
    inputs = json.loads((out / "conversion.json").read_text())["inputs"]
    assert (inputs["base"]["revision"], inputs["source"]["revision"]) == ("a" * 40, "b" * 40)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    put_into_cache(cache, "org/adapter", out, "c" * 40)
    again = offline(cache, tmp_path, "delta", f"org/base@{'a' * 40}", "org/adapter", "--rank", "3", "-o", "again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "conversion.json").read_text())["inputs"]["source"]["kind"] == "lora"
    for missing in ("org/nothing", "org/ft@v2"):
        refused = offline(cache, tmp_path, "delta", "org/base", missing)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"Error: {missing}: ")
        assert "HF_HUB_OFFLINE" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_local_path_never_asks_the_network(pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pair = pairs("llama")
    monkeypatch.chdir(pair.base.parent.parent)
    relative = f"{pair.base.parent.name}/base"  # has the form of a Hub id
    assert adapt_convert.inspect(relative)["tensors"] == len(state_of(pair.base))
    for mistyped in ("./bsae", "/no/such", "bsae", "a/b/c", "~/nothing-here", "", "org/na me", "../x", "ft/model.safetensors"):
        with pytest.raises(AdaptError, match="no such file or directory"):
            locate(mistyped)


@pytest.mark.parametrize(
    "arguments",
    [
        ("delta", "demo/bsae.safetensors", "ft"),
        ("delta", "base", "demo/model.safetensors"),
        ("inspect", "demo/model.gguf"),
        ("plan", "base", "demo/pytorch_model.bin"),
        ("merge", "base", "demo/lora.safetensors"),
        ("bundle", "base", "ft", "demo/lora.pt"),
        ("lint", "demo/lora.safetensors", "--for", "peft"),
        ("validate", "base", "ft", "demo/lora.safetensors"),
    ],
)
def test_a_mistyped_file_is_said_to_be_missing_and_not_asked_for(arguments: tuple[str, ...], pairs, tmp_path: Path) -> None:
    sides = {"base": str(pairs("llama").base), "ft": str(pairs("llama").ft)}
    result = CliRunner().invoke(main, [sides.get(word, word) for word in arguments])
    name = next(word for word in arguments if word.startswith("demo/"))
    assert result.exit_code == 1
    assert result.output == f"Error: {name}: no such file or directory (if a Hub repository is meant, write {name}@main)\n"


def test_a_revision_makes_a_name_that_ends_like_a_file_a_repository() -> None:
    assert is_hub_id("org/model.gguf@main")
    assert is_hub_id("org/model.gguf", "main")
    assert find_sources("org/model.bin", "org/base", "v1") == ["org/model.bin"]
    assert not is_hub_id("org/model.gguf")
