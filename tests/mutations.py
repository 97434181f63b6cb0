"""What can be wrong with a file: mutations of safetensors, JSON and any bytes, each drawn from a `random.Random`."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]
_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**30), 1e308, -0.5, 1e-320, float("nan"), float("inf"))
_TEXTS = ("", "x", "\0", "../../etc/passwd", "/etc/passwd", "\ud800", "\x1b[2J", "q_proj", "a" * 5000, "(", "(a+)+$", "*", "F32", "BF16")
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": {}}, [[[[[[]]]]]])
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "", "X" * 300, 7, None)


def _value(random: Random) -> Any:
    return random.choice(random.choice((_NUMBERS, _TEXTS, _OTHERS)))


def flip(content: bytes, random: Random) -> bytes:
    """One to four bytes anywhere."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def cut(content: bytes, random: Random) -> bytes:
    """Shorter, longer, empty, or with a piece missing or twice."""
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return random.choice(
        (content[:start], content + content[:start], b"", content[:start] + content[stop:], content[:stop] + content[start:])
    )


def json_value(content: bytes, random: Random) -> bytes:
    """A value somewhere in a JSON object replaced, removed or added."""
    data = json.loads(content)
    place: Any = data
    while random.random() < 0.6:
        inner = [value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, dict | list) and value]
        if not inner:
            break
        place = random.choice(inner)
    key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
    what = random.random()
    if what < 0.2:
        del place[key]
    elif what < 0.35 and isinstance(place, dict):
        place[str(random.choice(_TEXTS))] = _value(random)
    else:
        place[key] = _value(random)
    return json.dumps(data).encode("utf-8", "surrogatepass")


def adapter_config(content: bytes, random: Random) -> bytes:
    """What decides an adapter's scale, or which adapter it is; among others with expressions that backtrack for years."""
    config = json.loads(content)
    patterns = ("q_proj", ".*q_proj", "^.*self_attn.v_proj", "(([a-z0-9._]+)+)+!", "(.*)*!", ".*.*.*.*.*.*.*.*!", "(", "a|b", "")
    choices: tuple[tuple[str, Any], ...] = (
        ("lora_alpha", random.choice(_NUMBERS)),
        ("r", random.choice(_NUMBERS)),
        ("use_rslora", random.choice((True, 1, "yes", None))),
        ("alpha_pattern", {random.choice(patterns): random.choice((1, 8, 0.5, *_NUMBERS))}),
        ("rank_pattern", {random.choice(patterns): random.choice((1, 8, *_NUMBERS))}),
        ("alpha_pattern", _value(random)),
        ("use_dora", True),
        ("peft_type", random.choice(("VERA", "LORTA", "", None, 7))),
        ("modules_to_save", random.choice((["norm"], "norm", [7], 7))),
        ("base_model_name_or_path", _value(random)),
        ("fan_in_fan_out", True),
    )
    return json.dumps(config | dict(random.sample(choices, random.randint(1, 3)))).encode("utf-8", "surrogatepass")


def json_text(content: bytes, random: Random) -> bytes:
    """A JSON text in another form, or none."""
    depth = 10 ** random.randint(2, 5)
    whole = content.strip()
    return random.choice(
        (
            b"[" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
            b"[]",
            b"null",
            b'"text"',
            whole[:-1] + b"," + whole[1:],  # every key twice
            whole + whole,
            b"1" * depth,
            b"\0" * 100,
        )
    )


def header(content: bytes, random: Random) -> bytes:
    """One thing in a safetensors header changed; its length is put right again."""
    length = int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in entries if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = entries[name]
    what = random.randrange(9)
    if what == 0:
        entry["dtype"] = random.choice(_DTYPES)
    elif what == 1:
        entry["shape"] = random.choice(([-1], [0], [2**62, 2**62], [1] * 65, entry["shape"][::-1], [*entry["shape"], 1], _value(random)))
    elif what == 2:
        entry["data_offsets"][random.randrange(2)] += random.choice((-8, -1, 1, 8, 2**40, 2**70))
    elif what == 3:
        entry["data_offsets"] = random.choice((entry["data_offsets"][::-1], entries[other]["data_offsets"], [0], [], _value(random)))
    elif what == 4:
        entries[str(random.choice(_TEXTS))] = entries.pop(name)
    elif what == 5:
        entries[name], entries[other] = entries[other], entries[name]
    elif what == 6:
        entries.pop(name)
    elif what == 7:
        entries["__metadata__"] = _value(random)
    else:
        entries[name] = random.choice((_value(random), {}, {**entry, "more": _value(random)}))
    encoded = json.dumps(entries).encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


def length(content: bytes, random: Random) -> bytes:
    """The first eight bytes of a safetensors file."""
    claimed = random.choice((0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1, random.randrange(2**16)))
    return claimed.to_bytes(8, "little") + content[8:]


def numbers(content: bytes, random: Random) -> bytes:
    """Stored numbers replaced: not finite, huge, denormal."""
    size = int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        position = random.randrange(8 + size, len(content) - 3) & ~3
        changed[position : position + 4] = random.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\0\x80")
        )
    return bytes(changed)


def shard(content: bytes, random: Random) -> bytes:
    """An index that sends tensors elsewhere."""
    index = json.loads(content)
    targets = (
        "../secret.safetensors",
        "/etc/passwd",
        "../../etc/passwd",
        "..",
        ".",
        "",
        "nowhere.safetensors",
        "config.json",
        "a\\b",
        "a/b",
    )
    targets += ("\0", "model-00001-of-00002.safetensors", "CON", "a" * 400, "\ud800.safetensors")
    for name in random.sample(sorted(index["weight_map"]), random.randint(1, 3)):
        index["weight_map"][name] = random.choice((*targets, _value(random)))
    return json.dumps(index).encode("utf-8", "surrogatepass")


SAFETENSORS: tuple[Mutation, ...] = (header, header, header, length, flip, cut, numbers)
JSON: tuple[Mutation, ...] = (json_value, json_value, json_value, json_text, flip, cut)
CONFIG: tuple[Mutation, ...] = (adapter_config, adapter_config, adapter_config, json_value, json_text, flip)
INDEX: tuple[Mutation, ...] = (shard, shard, json_value, json_text, flip)
BYTES: tuple[Mutation, ...] = (flip, cut)
