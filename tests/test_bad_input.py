"""What a user or a hostile file can get wrong, through the real command line: one line, exit code 1, and nothing left behind.

The lines of the preflight may stand before the one that begins with "Error:", but only when the preflight itself succeeded.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapt_convert.cli import main

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def place(pairs, tmp_path: Path) -> Path:
    """A copy of the Llama pair as `base` and `ft`, and an empty `work` directory for what is written."""
    pair = pairs("llama")
    for side in (pair.base, pair.ft):
        shutil.copytree(side, tmp_path / side.name)
    (tmp_path / "work").mkdir()
    return tmp_path


def call(place: Path, *arguments: str, base: str = "base", ft: str = "ft", out: str = "work/out") -> click.testing.Result:
    command = ["delta", str(place / base), str(place / ft), "-o", str(place / out), *arguments]
    return click.testing.CliRunner().invoke(main, command)


def assert_refused(code: int, stderr: str, message: str, after_plan: bool = False) -> None:
    lines = stderr.splitlines()
    assert code == 1, stderr
    assert lines[-1].startswith("Error: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert lines[-1].isprintable()
    before = lines[:-1]
    assert all(re.match(r"\d+ tensors: |  note: |  and \d+ more", line) for line in before)
    assert bool(before) == after_plan


def refuse(place: Path, message: str, *arguments: str, after_plan: bool = False, **names: str) -> None:
    result = call(place, *arguments, **names)
    assert isinstance(result.exception, SystemExit), result.exception
    assert_refused(result.exit_code, result.stderr, message, after_plan)
    assert result.stdout == ""
    assert list((place / "work").iterdir()) == []


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(weights(directory))
    change(state)
    save_file(state, weights(directory), metadata={"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def relength(path: Path, length: int) -> None:
    content = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:])


def lie_about_offsets(directory: Path) -> None:
    content = weights(directory).read_bytes()
    weights(directory).write_bytes(content.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))


def huge_header(directory: Path) -> None:
    with open(weights(directory), "wb") as file:
        file.write((100 * 10**6).to_bytes(8, "little"))
        file.truncate(8 + 100 * 10**6)


def shard(directory: Path, name: str, keep: bool = True) -> None:
    """An index that puts every tensor into the shard `name`, which is there if `keep`."""
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights(directory)), name)}))
    shutil.copy(weights(directory), directory.parent / "x.safetensors")
    if keep:
        shutil.copy(weights(directory), directory / "x.safetensors")
    weights(directory).unlink()


def promise_more(directory: Path) -> None:
    shard(directory, "x.safetensors")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.extra"] = "x.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


class Code:
    """A pickle that writes `ran` when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def replace_by_pickle(directory: Path, content: Any = None, **options: Any) -> None:
    weights(directory).unlink()
    content = {Q: Code(directory / "ran")} if content is None else content
    torch.save(content, directory / "pytorch_model.bin", **options)


def replace_by_bytes(directory: Path, content: bytes, name: str = "pytorch_model.bin") -> None:
    weights(directory).unlink()
    (directory / name).write_bytes(content)


def in_pieces(directory: Path, *names: str) -> None:
    weights(directory).unlink()
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the files are still about
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def huge_view() -> dict[str, torch.Tensor]:
    return {"extra.weight": torch.zeros(1).expand(10**7, 10**7)}


# What is done to a checkpoint directory, and what the one line has to say. Each is done to the base and to the fine-tune.
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda d: os.truncate(weights(d), 9_000), "model.safetensors: should be .* truncated"),
    "truncated in the header": (lambda d: os.truncate(weights(d), 200), "truncated"),
    "empty file": (lambda d: os.truncate(weights(d), 0), "0 bytes long"),
    "lying header length": (lambda d: relength(weights(d), 2**60), "claims a header of"),
    "lying offsets": (lie_about_offsets, "does not fit|gap or an overlap"),
    "100 MB header": (huge_header, "claims a header of 100000000 bytes"),
    "index leaves its directory": (lambda d: shard(d, "../../x.safetensors"), r"names the shard '../../x.safetensors', which is outside"),
    "index one up": (lambda d: shard(d, "../x.safetensors"), "outside its own directory"),
    "index with absolute path": (lambda d: shard(d, str(d.parent / "x.safetensors")), "outside its own directory"),
    "index with backslashes": (lambda d: shard(d, "..\\x.safetensors"), "outside its own directory"),
    "index names nothing": (lambda d: shard(d, ""), "outside its own directory"),
    "missing shard": (lambda d: shard(d, "x.safetensors", keep=False), "x.safetensors is missing"),
    "index promises more": (promise_more, "'model.extra', which no shard holds"),
    "index is a list": (lambda d: (d / INDEX).write_text("[]"), "index.json: holds a JSON list"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
    "index of numbers": (lambda d: (d / INDEX).write_text('{"weight_map":{"a":1}}'), "no weight_map"),
    "index empty": (lambda d: (d / INDEX).write_text('{"weight_map":{}}'), "no weight_map|no tensors"),
    "no weights": (lambda d: weights(d).unlink(), "no model.safetensors, pytorch_model.bin or index"),
    "weights are a broken link": (lambda d: (weights(d).unlink(), weights(d).symlink_to("gone")), "safetensors: is a link to gone, where"),
    "config is a broken link": (lambda d: ((d / "config.json").unlink(), (d / "config.json").symlink_to("gone")), "config.json: cannot be"),
    "weights are a directory": (lambda d: (weights(d).unlink(), weights(d).mkdir()), "no model.safetensors"),
    "no tensors": (lambda d: save_file({}, weights(d)), "holds no tensors"),
    "pickle with code": (replace_by_pickle, "pytorch_model.bin: is a pickle that would run code"),
    "old pickle with code": (lambda d: replace_by_pickle(d, _use_new_zipfile_serialization=False), "would run code"),
    "bare pickle with code": (lambda d: replace_by_bytes(d, pickle.dumps(Code(d / "ran"))), "would run code|not a PyTorch file"),
    "pickle of a list": (lambda d: replace_by_pickle(d, [torch.ones(2)]), "holds a list, not a state dict"),
    "pickle of numbered tensors": (lambda d: replace_by_pickle(d, {1: torch.ones(2)}), "not a state dict"),
    "pickle without tensors": (lambda d: replace_by_pickle(d, {"epoch": 3}), "holds no tensors"),
    "pickle of a huge view": (lambda d: replace_by_pickle(d, huge_view()), "400000000000000 bytes, more than its file has"),
    "pickle of a sparse tensor": (lambda d: replace_by_pickle(d, {Q: torch.eye(3).to_sparse()}), "not supported|not a PyTorch"),
    "pickle cut": (lambda d: (replace_by_pickle(d, {Q: torch.ones(99)}), os.truncate(d / "pytorch_model.bin", 700)), "damaged"),
    "pickle of noise": (lambda d: replace_by_bytes(d, bytes(range(256)) * 9), "damaged or not a PyTorch file"),
    "TorchScript": (lambda d: replace_by_bytes(d, torchscript()), "TorchScript program; save its state_dict"),
    "pickle empty": (lambda d: replace_by_bytes(d, b""), "damaged or not a PyTorch file"),
    "FSDP": (lambda d: in_pieces(d, "pytorch_model_fsdp_0/.metadata"), "FSDP .*`accelerate merge-weights`"),
    "FSDP in pieces": (lambda d: in_pieces(d, "__0_0.distcp"), "FSDP .*`accelerate merge-weights`"),
    "DeepSpeed": (lambda d: in_pieces(d, "global_step1/zero_pp_rank_0_optim_states.pt"), "DeepSpeed .* zero_to_fp32.py"),
    "DeepSpeed script": (lambda d: in_pieces(d, "zero_to_fp32.py"), "DeepSpeed .* zero_to_fp32.py"),
    "GGUF": (lambda d: in_pieces(d, "model-Q4_K_M.gguf"), "GGUF"),
    "config broken": (lambda d: (d / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: holds a JSON list"),
    "config not UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"model_type":"\xff"}'), "config.json: is not valid JSON"),
    "config nested": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: is not valid JSON"),
    "quantised by config": (lambda d: configure(d, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq;.*the unquantised"),
    "quantised GPTQ names": (lambda d: edit(d, lambda s: s.update({"x.qweight": torch.ones(2, 2).int()})), "GPTQ or AWQ; x.qweight"),
    "quantised fp8": (lambda d: edit(d, lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})), "quantised .F8_E4M3"),
    "quantised MXFP4": (lambda d: edit(d, lambda s: s.update(x_blocks=torch.ones(2), x_scales=torch.ones(2))), "MXFP4; x_blocks"),
}  # fmt: skip


@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(place: Path, case: str, side: str) -> None:
    damage, message = BROKEN[case]
    damage(place / side)
    before = sorted((place / side).rglob("*"))
    refuse(place, message)
    assert sorted((place / side).rglob("*")) == before  # so the code in a pickle did not run


def test_the_code_in_the_pickle_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


NOT_FINITE = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": -float("inf")}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("to", ["lora", "lorta"])
def test_not_finite(place: Path, name: str, value: str, to: str) -> None:
    edit(place / "ft", lambda state: state[name].view(-1)[3:4].fill_(NOT_FINITE[value]))
    refuse(place, f"{re.escape(name)}: the change .* is not finite", "--to", to, after_plan=True)


# Pairs that do not belong together.
MISFITS: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "shapes": (lambda d: edit(d, lambda s: s.update({Q: torch.ones(32, 33)})), r"q_proj.weight is \[32, 33\] .* but \[32, 32\]", False),
    "norm's width": (lambda d: edit(d, lambda s: s.update({"model.layers.0.input_layernorm.weight": torch.ones(31)})), "31", False),
    "another architecture": (lambda d: configure(d, model_type="gpt2"), "is a gpt2 and .* a llama", False),
    "nothing in common": (lambda d: edit(d, lambda s: [s.update({f"x{n}": s.pop(n)}) for n in list(s)]), "no weight matrix in", False),
    "nothing changed": (lambda d: shutil.copy(weights(d.parent / "base"), weights(d)), "no tensor changed", True),
    "no matrix changed": (
        lambda d: edit(d, lambda s: s.update(load_file(weights(d.parent / "base")) | {"model.norm.weight": torch.ones(32)})),
        "none of the targeted matrices changed", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("to", ["lora", "lorta"])
@pytest.mark.parametrize("case", MISFITS)
def test_misfits(place: Path, case: str, to: str) -> None:
    change, message, after_plan = MISFITS[case]
    change(place / "ft")
    refuse(place, message, "--to", to, after_plan=after_plan)


@pytest.mark.parametrize("other", ["gpt2", "bert", "vit", "t5", "qwen2"])
def test_real_other_architectures(pairs, place: Path, other: str) -> None:
    shutil.copytree(pairs(other).ft, place / "other")
    refuse(place, f"is a {other} and .* a llama", ft="other")
    if other != "qwen2":  # the same names but for its biases: without a config it could be a fine-tune
        (place / "other" / "config.json").unlink()
        refuse(place, "in common|not a fine-tune of this base", ft="other")


ODD_CONFIGS: list[dict[str, Any]] = [
    {"architectures": "LlamaForCausalLM"}, {"architectures": [7]}, {"architectures": {}}, {"architectures": 5},
    {"num_attention_heads": 0}, {"num_attention_heads": -4}, {"num_attention_heads": "4"}, {"num_attention_heads": True},
    {"num_attention_heads": 10**30}, {"num_attention_heads": 3}, {"num_key_value_heads": 5}, {"hidden_size": -1},
    {"head_dim": 0}, {"head_dim": 10**9}, {"model_type": ["llama"]}, {"model_type": None}, {"tie_word_embeddings": "no"},
    {"quantization_config": "yes"}, {"quantization_config": {"quant_method": None}}, {"quantization_config": []},
]  # fmt: skip


@pytest.mark.parametrize("to", ["lora", "lorta"])
@pytest.mark.parametrize("changes", ODD_CONFIGS, ids=str)
def test_odd_configs_never_end_in_a_traceback(place: Path, changes: dict[str, Any], to: str) -> None:
    for side in ("base", "ft"):
        configure(place / side, **changes)
    result = call(place, "--to", to, "--rank", "2")
    if result.exit_code != 0:
        assert isinstance(result.exception, SystemExit), (changes, result.exception)
        assert_refused(1, result.stderr, "", after_plan=result.stderr.count("\n") > 1)
        assert list((place / "work").iterdir()) == []


OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "rank 0": (["--rank", "0"], 1, "--rank 0: must be"),
    "rank -3": (["--rank", "-3"], 1, "--rank -3: must be"),
    "rank abc": (["--rank", "abc"], 1, "must be a whole number"),
    "rank 1.5": (["--rank", "1.5"], 1, "must be a whole number"),
    "energy 0": (["--energy", "0"], 1, "--energy 0"),
    "energy 1.1": (["--energy", "1.1"], 1, "--energy 1.1"),
    "energy nan": (["--energy", "nan"], 1, "--energy nan"),
    "budget of half a unit": (["--budget", "20ib"], 1, "'20ib' is not a size"),
    "budget text": (["--budget", "lots"], 1, "'lots' is not a size"),
    "budget 1": (["--budget", "1"], 1, "cheapest rank"),
    "two sizes": (["--rank", "2", "--energy", "0.5"], 1, "contradict"),
    "target": (["--to", "latent"], 1, "unknown target"),
    "dtype": (["--dtype", "int4"], 1, "--dtype int4"),
    "device": (["--device", "tpu:9"], 1, "--device tpu:9"),
    "device text": (["--device", "cpu\nx"], 1, "--device"),
    "module": (["--target-modules", "nothing"], 1, "no module is called so"),
    "exclude": (["--exclude", "nothing"], 1, "--exclude nothing: no module is called so; there are down_proj"),
    "exclude two": (["--exclude", "nothing,more"], 1, "--exclude nothing,more: no module"),
    "budget of 400 digits": (["--budget", "9" * 400], 1, "is not a size"),
    "device empty": (["--device", ""], 1, "--device : there is no such device"),
    "push": (["--push", "nonsense", "--dry-run"], 1, "nonsense: is no Hub id"),
    "unknown option": (["--ranks", "3"], 2, "No such option"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(place: Path, case: str) -> None:
    arguments, code, message = OPTIONS[case]
    if code == 1:
        refuse(place, message, *arguments, after_plan=case == "budget 1")
        return
    result = call(place, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert list((place / "work").iterdir()) == []


def test_one_name_of_several_to_exclude_is_enough(place: Path) -> None:
    result = call(place, "--exclude", "q_proj,wte", "--rank", "2")
    assert result.exit_code == 0
    assert "note: --exclude wte matches no module" in result.stderr
    repeat = click.testing.CliRunner().invoke(
        main, ["delta", str(place / "base"), str(place / "work" / "out"), "--exclude", "q_proj", "-o", str(place / "again")]
    )
    assert repeat.exit_code == 0  # the base has it, though the adapter does not


def test_a_dry_run_refuses_an_output_that_exists(place: Path) -> None:
    assert call(place, "--dry-run").exit_code == 0
    (place / "work" / "out").mkdir()
    result = call(place, "--dry-run")
    assert_refused(result.exit_code, result.stderr, "out already exists")


def test_what_is_no_file(place: Path) -> None:
    (place / "link").symlink_to("gone")
    os.mkfifo(place / "pipe")
    for side in ("base", "ft"):
        refuse(place, "link: is a link to gone, where nothing is", **{side: "link"})
        refuse(place, "pipe: is neither a file nor a directory", **{side: "pipe"})
    refuse(place, "link is a link to nothing, so .* cannot be written", out="link/out")
    shutil.move(place / "ft", place / "adapter")
    (place / "adapter" / "adapter_config.json").symlink_to("gone")
    refuse(place, "adapter_config.json: cannot be opened: No such file", ft="adapter")


def test_paths(place: Path) -> None:
    refuse(place, "nowhere: no such file or directory", base="nowhere")
    refuse(place, "nowhere: no such file or directory", ft="nowhere")
    not_utf8 = os.fsdecode(b"\xff")
    (place / "base").rename(place / not_utf8)
    refuse(place, r"\\udcff: the path is not valid UTF-8; rename it", base=not_utf8)
    (place / not_utf8).rename(place / "base")
    refuse(place, "config.json: is not a .safetensors or .bin file", ft="ft/config.json")
    (place / "q4.gguf").write_bytes(b"GGUF" + bytes(20))
    refuse(place, "q4.gguf: is no GGUF model that transformers can read", base="q4.gguf")
    refuse(place, "q4.gguf: is damaged or not a GGUF file", ft="q4.gguf")
    assert call(place, out="work/adapter").exit_code == 0
    shutil.move(place / "work" / "adapter", place / "adapter")
    refuse(place, "adapter: is an adapter; BASE has to be the full model", base="adapter")
    result = click.testing.CliRunner().invoke(main, ["merge", str(place / "base"), str(place / "ft"), "-o", str(place / "work" / "m")])
    assert_refused(result.exit_code, result.stderr, "is a full checkpoint, not an adapter")
    assert list((place / "work").iterdir()) == []
