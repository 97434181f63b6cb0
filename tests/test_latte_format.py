"""LatTE directories: what is written is read back, the same twice, and what is broken is refused by name; the command line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapt_convert.cli import main
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment, fingerprint, matches_fingerprint, read_latte
from adapt_convert.formats.location import locate


def adapter() -> LatteAdapter:
    first = LatteTask("a", readers={"m.q": torch.ones(3, 1)}, writers={"m.o": torch.zeros(1, 3).bfloat16()})
    second = LatteTask("b", biases={"m.q": torch.full((3,), 2.0)}, exact={"n.weight": torch.ones(2)})
    segments = [Segment(0, 1, torch.eye(2)[:, :1]), Segment(1, 2, torch.eye(2))]
    return LatteAdapter("llama", segments, [first, second], {"m.q": {"stored": "float32", "float32": "ab"}}, base_model="org/base")


def written(path: Path) -> Path:
    path.mkdir()
    adapter().write(path)
    return path


def test_the_bytes_are_as_specified(tmp_path: Path) -> None:
    """Parsed by hand from docs/formats.md: header length, header, float32 first, then bfloat16."""
    data = (written(tmp_path / "x") / "latte.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    names = ["1.reader.m.q", "2.bias.m.q", "2.exact.n.weight", "segment.0.Q", "segment.1.Q", "1.writer.m.o"]
    assert list(header) == names
    assert header["2.bias.m.q"] == {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}
    assert data[8 + length + 12 :][:12] == struct.pack("<3f", 2.0, 2.0, 2.0)
    assert header["1.writer.m.o"]["dtype"] == "BF16"
    assert data.endswith(bytes(6))


def test_round_trip(tmp_path: Path) -> None:
    read, original = read_latte(locate(written(tmp_path / "x"))), adapter()
    assert read.config() == original.config()
    assert read.tensors().keys() == original.tensors().keys()
    assert all(torch.equal(read.tensors()[key], value) for key, value in original.tensors().items())  # type: ignore[arg-type]


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "version": (lambda c, t: c.update(version=2), r"version 2; this adapt-convert reads latte version 1"),
    "no segments": (lambda c, t: c.update(segments=[]), r"segments that do not go with its construction"),
    "gap": (lambda c, t: c.update(segments=[[0, 1, 1], [2, 3, 2]]), r"its segments do not follow each other"),
    "reversed": (lambda c, t: c.update(segments=[[1, 0, 1], [0, 2, 2]]), r"segment 0 covers layers 1 to 0"),
    "rank": (lambda c, t: c.update(segments=[[0, 1, 2], [1, 2, 2]]), r"segment\.0\.Q has shape \[2, 1\], the config says rank 2"),
    "width": (lambda c, t: c.update(hidden_size=3), r"segment\.0\.Q has 2 rows, the config says hidden_size 3"),
    "no basis": (lambda c, t: t.pop("segment.1.Q"), r"segment\.1\.Q is missing"),
    "a task too many": (lambda c, t: t.update({"3.reader.m.q": torch.ones(3, 1)}), r"'3\.reader\.m\.q' is of task 3, the config names 2"),
    "a name of no kind": (lambda c, t: t.update({"1.other.m.q": torch.ones(3, 1)}), r"'1\.other\.m\.q' is no tensor of a LatTE"),
    "no matrix": (lambda c, t: t.update({"1.reader.m.q": torch.ones(3)}), r"1\.reader\.m\.q is \[3\] of torch\.float32, expected a matrix"),
    "a segment too many": (lambda c, t: t.update({"segment.2.Q": torch.eye(2)}), r"'segment\.2\.Q' is of no segment in the config"),
    "basis of NaN": (lambda c, t: t["segment.1.Q"].fill_(float("nan")), r"the columns of segment\.1\.Q are not orthonormal"),
    "skew basis": (lambda c, t: t["segment.1.Q"].fill_(0.5), r"the columns of segment\.1\.Q are not orthonormal"),
    "integers": (
        lambda c, t: t.update({"1.reader.m.q": torch.ones(3, 1, dtype=torch.int32)}),
        r"1\.reader\.m\.q is \[3, 1\] of torch\.int32, expected",
    ),
    "construction": (lambda c, t: c.update(construction="other"), r"the construction 'other' is not known"),
    "scores in a residual": (lambda c, t: t.update({"1.score.m.q_A": torch.ones(1, 2)}), r"do not go with the construction 'residual'"),
    "two tasks with scores": (lambda c, t: c.update(construction="score", segments=[]), r"the score construction holds one task"),
    "tasks as a text": (lambda c, t: c.update(tasks="ab"), r"tasks are 'ab', expected a list of names"),
    "no tasks": (lambda c, t: c.pop("tasks"), r"not a readable LatTE adapter: 'tasks'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x")
    config, tensors = json.loads((path / "latte_config.json").read_text()), load_file(path / "latte.safetensors")
    change, message = BROKEN[what]
    change(config, tensors)
    (path / "latte_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "latte.safetensors")
    with pytest.raises(AdaptError, match=message):
        read_latte(locate(path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x")
    (path / "latte.safetensors").unlink()
    with pytest.raises(AdaptError, match=r"has latte_config\.json but no latte\.safetensors"):
        read_latte(locate(path))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_base_is_known_again_in_whatever_dtype_it_is_loaded(stored: torch.dtype, loaded: torch.dtype) -> None:
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).to(stored)
    hashes = fingerprint(weight, stored)
    assert matches_fingerprint(weight.to(loaded), hashes)
    other = weight.clone()
    other[0, 0] += 1
    assert not matches_fingerprint(other.to(loaded), hashes)


def test_the_command_line_writes_a_latte_and_a_bundle_the_same_twice(pairs: Callable[[str], Any], tmp_path: Path) -> None:
    pair, runner = pairs("llama"), CliRunner()
    for name in ("one", "two"):
        arguments = ["delta", pair.base, pair.ft, "--to", "latte", "--rank", 4, "--segments", 2, "-o", tmp_path / name]
        result = runner.invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "one" / "latte.safetensors").read_bytes() == (tmp_path / "two" / "latte.safetensors").read_bytes()
    report = json.loads((tmp_path / "one" / "conversion.json").read_text())
    assert report["target"] == "latte"
    assert "adapt_convert.load" in (tmp_path / "one" / "README.md").read_text()
    arguments = ["bundle", pair.base, pair.ft, pair.ft, "--rank", 4, "--exclude", "embed_tokens,lm_head", "--json", "-o", tmp_path / "many"]
    result = runner.invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert sorted(json.loads(result.stdout)["tasks"]) == ["ft", "ft-2"]
    shown = json.loads(runner.invoke(main, ["inspect", str(tmp_path / "many"), "--json"]).stdout)
    assert (shown["kind"], shown["tasks"], shown["segments"]) == ("LATTE", ["ft", "ft-2"], [[0, 2, 4]])
    merged = runner.invoke(main, ["merge", str(pair.base), str(tmp_path / "one"), "-o", str(tmp_path / "no")])
    assert (merged.exit_code, (tmp_path / "no").exists()) == (1, False)
    assert "is a LatTE, which runs expanded and is never merged" in merged.output
    refused = runner.invoke(main, ["bundle", str(pair.base), str(pair.ft), "--to", "lora", "-o", str(tmp_path / "no")])
    assert (refused.exit_code, (tmp_path / "no").exists()) == (1, False)
    assert "only --to latte and --to shared-lora can mix tasks" in refused.output
