"""Our safetensors reader and writer against the `safetensors` library, and against files made to mislead a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from adapt_convert.formats.dtypes import TORCH_NAMES, bits_of, file_name, torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.safetensors_file import MAX_HEADER, LazyTensor, SafetensorsFile, write_safetensors

DTYPES = {name: torch_dtype(name) for name in TORCH_NAMES}
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (3, 4), (2, 3, 2, 1)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, so that every pattern of a dtype occurs, NaN payloads among them."""
    count = torch.Size(shape).numel()
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits % 2).bool().reshape(shape) if dtype == torch.bool else bits.view(dtype).reshape(shape)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert bytes(got.reshape(-1).view(torch.uint8).numpy()) == bytes(expected.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    save_file({"before": torch.ones(3), "x": tensor, "z": torch.zeros(1)}, tmp_path / "f.safetensors", metadata={"a": "ü"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert file.metadata == {"a": "ü"}
    assert file.infos["x"].shape == shape
    assert DTYPES[file.infos["x"].dtype] == dtype
    assert bits_of(file.infos["x"].dtype) == 8 * dtype.itemsize
    assert file_name(dtype) == file.infos["x"].dtype
    assert_same_bits(file.read("x"), tensor)


MIXED = {f"{name}.{shape}": random_tensor(dtype, shape, i) for name, dtype in DTYPES.items() for i, shape in enumerate(SHAPES)}
GOLDEN = {
    "every dtype": (MIXED, {"format": "pt"}),
    "no metadata": ({"x": torch.arange(6.0).reshape(2, 3)}, {}),
    "non-ASCII and quotes": ({'h."ä"\\\n\x01\u2028/.w': torch.ones(2), "日本": torch.ones(3), "\x7f": torch.ones(1)}, {"k": "ü\t"}),
    "not contiguous": ({"x": torch.arange(12.0).reshape(3, 4).T, "y": torch.arange(12.0)[::2]}, {}),
    "empty": ({}, {"format": "pt"}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_writes_the_bytes_that_safetensors_writes(tmp_path: Path, case: str) -> None:
    tensors, metadata = GOLDEN[case]
    size = write_safetensors(tmp_path / "ours.safetensors", tensors, metadata)
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == save({name: value.contiguous() for name, value in tensors.items()}, metadata or None)
    assert size == len(ours)


def test_safe_open_reads_ours(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f.safetensors", dict(reversed(MIXED.items())), {"format": "pt"})
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(MIXED)
        for name, value in MIXED.items():
            assert_same_bits(file.get_tensor(name), value)


def test_lazy_tensors_are_loaded_one_at_a_time_in_file_order(tmp_path: Path) -> None:
    values = {"b": torch.arange(4.0), "a": torch.arange(3.0), "c": torch.ones(5, dtype=torch.float64)}
    loaded: list[str] = []

    def lazy(name: str) -> LazyTensor:
        def load() -> torch.Tensor:
            loaded.append(name)
            return values[name]

        return LazyTensor(tuple(values[name].shape), values[name].dtype, load)

    write_safetensors(tmp_path / "f.safetensors", {name: lazy(name) for name in values}, {})
    assert loaded == ["c", "a", "b"]
    assert (tmp_path / "f.safetensors").read_bytes() == save(values)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_lazy_tensor_must_keep_its_word(tmp_path: Path, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x: announced"):
        write_safetensors(tmp_path / "f.safetensors", {"x": LazyTensor((2,), torch.float32, lambda: value)}, {})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    )
)
def test_round_trip(tmp_path: Path, content: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: random_tensor(dtype, tuple(shape), i) for i, (name, (dtype, shape)) in enumerate(content.items())}
    path = tmp_path / "f.safetensors"
    write_safetensors(path, tensors, {})
    file = SafetensorsFile(path)
    assert set(file.infos) == set(tensors)
    by_library = load_file(path)
    for name, value in tensors.items():
        assert_same_bits(file.read(name), value)
        assert_same_bits(by_library[name], value)


# Hostile files. A header is given as text (or bytes); the data after it is `data` bytes long.

X = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def entry(**changes: Any) -> str:
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


HEADERS: dict[str, tuple[str | bytes, int, str]] = {
    "not JSON": ("{", 0, "not valid JSON"),
    "not JSON at all": (b"\x89PNG\r\n\x1a\n", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', 0, "not valid JSON"),
    "UTF-16": (("{" + X + "}").encode("utf-16"), 8, "not valid JSON"),
    "name with half a surrogate": (('{"\\ud800' + X[1:] + "}"), 8, "not valid JSON"),
    "list": ("[]", 0, "not a JSON object"),
    "number": ("7", 0, "not a JSON object"),
    "nested": ("[" * 100_000, 0, "not valid JSON"),
    "nested object": ('{"x":' * 100_000, 0, "not valid JSON"),
    "number of 5000 digits": (f'{{"x":{"9" * 5000}}}', 0, "not valid JSON"),
    "metadata not an object": ('{"__metadata__":[1]}', 0, "__metadata__"),
    "metadata of numbers": ('{"__metadata__":{"format":1}}', 0, "__metadata__"),
    "metadata false": ('{"__metadata__":false}', 0, "__metadata__"),
    "duplicate tensor": ("{" + X + "," + X + "}", 8, "duplicate"),
    "duplicate offsets": ('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4],"data_offsets":[0,8]}}', 8, "duplicate"),
    "entry is a list": ('{"x":[1,2]}', 0, "malformed"),
    "entry is null": ('{"x":null}', 0, "malformed"),
    "entry is a string": ('{"x":"dtype shape data_offsets"}', 0, "malformed"),
    "no dtype": ('{"x":{"shape":[2],"data_offsets":[0,8]}}', 8, "malformed"),
    "no shape": ('{"x":{"dtype":"F32","data_offsets":[0,8]}}', 8, "malformed"),
    "no offsets": ('{"x":{"dtype":"F32","shape":[2]}}', 8, "malformed"),
    "negative shape": (entry(shape=[-2]), 8, "malformed"),
    "two negatives": (entry(shape=[-1, -2]), 8, "malformed"),
    "bool in shape": (entry(shape=[True, 2]), 8, "malformed"),
    "float in shape": (entry(shape=[2.0]), 8, "malformed"),
    "string as shape": (entry(shape="2"), 8, "malformed"),
    "object as shape": (entry(shape={}, data_offsets=[0, 4]), 4, "malformed"),
    "null as shape": (entry(shape=None), 8, "malformed"),
    "negative offset": (entry(data_offsets=[-8, 0]), 8, "malformed"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), 8, "malformed"),
    "offsets as object": (entry(data_offsets={"0": 1, "8": 2}), 8, "malformed"),
    "offsets reversed": (entry(data_offsets=[8, 0]), 8, "does not fit"),
    "unknown dtype": (entry(dtype="F99"), 8, "unknown dtype"),
    "dtype in lower case": (entry(dtype="f32"), 8, "unknown dtype"),
    "dtype is a list": (entry(dtype=["F32"]), 8, "malformed"),
    "dtype is null": (entry(dtype=None), 8, "malformed"),
    "shape too large": (entry(shape=[3]), 8, "does not fit"),
    "shape wraps at 2^64": (entry(shape=[2**62, 4], data_offsets=[0, 0]), 0, "no tensor has"),
    "shape of huge numbers": (entry(shape=[10**4000] * 9, data_offsets=[0, 0]), 0, "no tensor has"),
    "too many dimensions": (entry(shape=[1] * 100_000, data_offsets=[0, 4]), 4, "100000 dimensions"),
    "size beyond int64, empty": (entry(shape=[2**70, 0], data_offsets=[0, 0]), 0, "no tensor has"),
    "beyond the file": (entry(data_offsets=[0, 8]), 4, "truncated"),
    "far beyond the file": (entry(shape=[2**40], data_offsets=[0, 2**42]), 8, "truncated"),
    "does not start at 0": (entry(data_offsets=[8, 16]), 16, "gap"),
    "hole": ("{" + X + ',"y":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}', 16, "gap"),
    "overlap": ("{" + X + ',"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 12, "overlap"),
    "same place": ("{" + X + ',"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "overlap"),
    "data left over": ("{" + X + "}", 12, "truncated or damaged"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    encoded = header.encode() if isinstance(header, str) else header
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(data))
    assert_refused(path, message)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(AdaptError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text
    assert message in text
    assert text.isprintable()  # so it is one line, and cannot drive a terminal
    assert len(text) < 1200


LENGTHS = {"negative": 2**64 - 1, "huge": 2**62, "100 MB": 100 * 2**20, "over the limit": MAX_HEADER + 1, "one too many": None, "zero": 0}


@pytest.mark.parametrize("case", LENGTHS)
def test_lying_header_length(tmp_path: Path, case: str) -> None:
    content = save({"x": torch.ones(2)})
    length = LENGTHS[case] if LENGTHS[case] is not None else len(content) - 8 + 1
    path = tmp_path / "bad.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    assert_refused(path, "not valid JSON" if length == 0 else "header of")


def test_a_real_header_of_100_mb_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.safetensors"
    with open(path, "wb") as file:
        file.write((100 * 10**6).to_bytes(8, "little"))
        file.truncate(8 + 100 * 10**6)  # a hole: no disk is used
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("the header was parsed"))
    assert_refused(path, "header of 100000000 bytes")


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    content = save({"x": torch.ones(2), "y": torch.ones(1, 3)}, {"format": "pt"})
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert_refused(path, "bytes long")
    path.write_bytes(content)
    assert set(SafetensorsFile(path).infos) == {"x", "y"}


def test_cut_while_open(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdaptError, match="ends inside 'x'"):
        file.read("x")
    path.unlink()
    with pytest.raises(AdaptError, match="cannot be read: No such file"):
        file.read("x")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3FNUZ", "F4"])
def test_foreign_dtypes_are_listed_but_not_read(tmp_path: Path, dtype: str) -> None:
    header = entry(dtype=dtype, shape=[8 if dtype == "F4" else 4], data_offsets=[0, 4]).encode()
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    file = SafetensorsFile(path)
    assert file.infos["x"].nbytes == 4
    with pytest.raises(AdaptError, match=f"stores 'x' as {dtype}, a quantised format"):
        file.read("x")


def test_names_cannot_drive_a_terminal(tmp_path: Path) -> None:
    header = json.dumps({"\x1b[2J\n" + "a" * 10_000: None}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(path, "malformed")
