"""LoDA directories: what is written is read back, byte for byte as docs/formats.md says, and what is broken is refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import locate
from adapt_convert.formats.loda import LodaAdapter, LodaMatrix, pack_bits, read_loda, unpack_bits

P = "base_model.model."


def adapter() -> LodaAdapter:
    """One matrix of each kind: linear, with f1 and f2, low-rank beneath, and sparse beneath; all `(out, in) = (3, 2)`."""
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]])
    f1, f2 = (torch.tensor([[6.0]]), torch.tensor([[7.0]])), torch.tensor([8.0, 9.0, 10.0])
    keep = torch.tensor([[True, False], [False, True], [True, True]])
    matrices = {
        "m.a": LodaMatrix(A, B),
        "m.b": LodaMatrix(A, B, f1, f2),
        "m.c": LodaMatrix(A, B, base=LowRankDelta(-B, -A)),
        "m.d": LodaMatrix(A, B, keep=keep),
    }
    return LodaAdapter("loda+", matrices, torch.bfloat16, {"n.weight": torch.ones(2)}, base_model="org/base")


def written(path: Path) -> Path:
    path.mkdir()
    adapter().write(path)
    return path


def test_the_bytes_are_as_specified(tmp_path: Path) -> None:
    """Parsed by hand: header length, header, float32 first, then bfloat16, then the bits."""
    data = (written(tmp_path / "x") / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    linear = [f"{P}m.{m}.lora_{x}.weight" for m in "abcd" for x in "AB"]
    own = [f"{P}m.b.loda_{x}.weight" for x in ("f1_in", "f1_out", "f2")] + [f"{P}m.c.loda_base_{x}.weight" for x in "AB"]
    assert list(header) == [f"{P}n.weight", *sorted([*linear, *own]), f"{P}m.d.loda_keep"]
    assert header[f"{P}m.b.loda_f2.weight"]["shape"] == [3]
    start, stop = header[f"{P}m.b.loda_f1_out.weight"]["data_offsets"]
    assert data[8 + length :][start:stop] == struct.pack("<f", 7.0)[2:]  # bfloat16: the upper half of a float32
    assert header[f"{P}m.d.loda_keep"] == {"dtype": "U8", "shape": [1], "data_offsets": [len(data) - 9 - length, len(data) - 8 - length]}
    assert data[-1] == 0b111001  # entries 0, 3, 4 and 5 stay
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["version"], config["variant"], config["r"]) == ("LODA", 1, "loda+", 1)
    assert (config["negative_slope"], config["layer_norm_eps"], config["target_modules"]) == (0.8, 1e-5, ["a", "b", "c", "d"])


def test_round_trip(tmp_path: Path) -> None:
    read, original = read_loda(locate(written(tmp_path / "x"))), adapter()
    assert read.config() == original.config()
    read.exact = {name: value.load() for name, value in read.exact.items()}  # type: ignore[union-attr]
    assert read.tensors().keys() == original.tensors().keys()
    assert all(torch.equal(read.tensors()[key], value) for key, value in original.tensors().items())  # type: ignore[arg-type]
    assert torch.equal(read.matrices["m.d"].keep, original.matrices["m.d"].keep)  # type: ignore[arg-type]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_masks_of_any_shape_come_back(rows: int, columns: int, seed: int) -> None:
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(keep)
    assert len(packed) == (rows * columns + 7) // 8
    assert torch.equal(unpack_bits(packed, (rows, columns)), keep)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "version": (lambda c, t: c.update(version=2), r"version 2; this adapt-convert reads LODA version 1"),
    "variant": (lambda c, t: c.update(variant="q-loda"), r"the variant 'q-loda' is not known"),
    "slope": (lambda c, t: c.update(negative_slope=0.01), r"negative_slope is 0\.01; this adapt-convert computes 0\.8 alone"),
    "half a pair": (lambda c, t: t.pop(f"{P}m.a.lora_B.weight"), r"m\.a: lora_B\.weight is missing"),
    "no linear part": (lambda c, t: [t.pop(f"{P}m.b.lora_{x}.weight") for x in "AB"], r"m\.b: lora_A\.weight is missing"),
    "half an f1": (lambda c, t: t.pop(f"{P}m.b.loda_f1_in.weight"), r"m\.b: loda_f1_in\.weight is missing"),
    "f2 alone": (lambda c, t: t.update({f"{P}m.a.loda_f2.weight": torch.ones(3)}), r"m\.a: f2 is \[3\], expected \[3\] beside an f1"),
    "f2 of another length": (lambda c, t: t.update({f"{P}m.b.loda_f2.weight": torch.ones(2)}), r"m\.b: f2 is \[2\], expected \[3\]"),
    "f1 of another rank": (lambda c, t: t.update({f"{P}m.b.loda_f1_in.weight": torch.ones(2, 2)}), r"m\.b: f1 is \[\[2, 2\], \[1, 1\]\]"),
    "ranks that differ": (lambda c, t: t.update({f"{P}m.a.lora_A.weight": torch.ones(2, 2)}), r"A \[2, 2\] and B \[3, 1\] do not multiply"),
    "no matrix": (lambda c, t: t.update({f"{P}m.a.lora_A.weight": torch.ones(2)}), r"A \[2\] and B \[3, 1\] do not multiply"),
    "low rank of another shape": (
        lambda c, t: t.update({f"{P}m.c.loda_base_A.weight": torch.ones(1, 4)}),
        r"m\.c: the weight in place of the base's is \[3, 4\], the adapter \[3, 2\]",
    ),
    "bits too few": (
        lambda c, t: t.update({f"{P}m.d.loda_keep": torch.zeros(0, dtype=torch.uint8)}),
        r"loda_keep is \[0\] of torch\.uint8",
    ),
    "bits beyond": (
        lambda c, t: t.update({f"{P}m.d.loda_keep": torch.tensor([255], dtype=torch.uint8)}),
        r"loda_keep has bits beyond the 6 entries",
    ),
    "both beneath": (
        lambda c, t: t.update({f"{P}m.c.loda_keep": torch.tensor([1], dtype=torch.uint8)}),
        r"m\.c: both a low-rank and a sparse weight",
    ),
    "NaN": (lambda c, t: t[f"{P}m.a.lora_A.weight"].fill_(float("nan")), r"m\.a: lora_A\.weight is not finite"),
    "integers": (lambda c, t: t.update({f"{P}m.a.lora_A.weight": torch.ones(1, 2, dtype=torch.int32)}), r"stored as I32, expected"),
    "no matrices at all": (lambda c, t: [t.pop(key) for key in list(t) if ".m." in key], r"it adapts no matrix"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x")
    config, tensors = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    change, message = BROKEN[what]
    change(config, tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(AdaptError, match=message) as caught:
        read_loda(locate(path))
    assert "\n" not in str(caught.value)
