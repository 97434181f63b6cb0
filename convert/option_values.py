"""Values of options as a command line, a manifest or Python gives them, and what is made of them."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

from adapt_convert.formats.errors import AdaptError

BUDGETS = "at least one byte, or a share of the base between 0% and 100%"
_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """`20MB`, `1.5 GiB` or plain bytes, as a number of bytes. Raises `AdaptError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[kmg]i?)?b)?\s*", text.lower())
    size = float(match[1]) * _UNITS[match[2] or "b"] if match else math.inf
    if size >= 2**63:  # more than any file can have
        raise AdaptError(f"{reprlib.repr(text)} is not a size; write it like 20MB, 512KiB or 1.5GB")
    return int(size)


def budget_name(nbytes: int) -> str:
    """A number of bytes as `parse_size` reads it, in the largest unit that divides it: `20MB`."""
    unit = next(unit for unit in ("gb", "mb", "kb", "b") if nbytes % _UNITS[unit] == 0)
    return f"{nbytes // _UNITS[unit]}{unit.upper()}"


def _whole_number(option: str, value: object) -> int:
    try:
        if isinstance(value, int | str) and not isinstance(value, bool) and (number := int(value)).bit_length() < 64:
            return number
    except ValueError:
        pass
    raise AdaptError(f"{option} {_brief(value)}: must be a whole number")


def _brief(value: object) -> str:
    return value if isinstance(value, str) else reprlib.repr(value)  # a manifest may hold anything, of any size


def _number(option: str, value: object) -> float:
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise AdaptError(f"{option} {_brief(value)}: must be a number")


def _budget(option: str, value: object) -> int | float:
    if isinstance(value, float):
        return int(value) if 1 <= value < 2**63 else value
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip().removesuffix("%")) / 100
        except ValueError:
            share = math.nan
        if 0 < share < 1:
            return share
        raise AdaptError(f"{option} {value}: must be {BUDGETS}")
    return parse_size(value) if isinstance(value, str) else _whole_number(option, value)


def _calibration(option: str, value: object) -> str:
    if isinstance(value, str | Path) and str(value).strip():
        return str(value)
    raise AdaptError(f"{option}: name a file of text or token ids, or give self")


def _segments(option: str, value: object) -> int | str:
    return "auto" if value == "auto" else _whole_number(option, value)


def _names(option: str, value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise AdaptError(f"{option} {_brief(value)}: must be names of modules")
    return tuple(part.strip() for name in listed for part in name.split(",") if part.strip())


PARSERS: dict[str, Callable[[str, object], object]] = {
    "rank": _whole_number,
    "energy": _number,
    "budget": _budget,
    "seed": _whole_number,
    "segments": _segments,
    "target_modules": _names,
    "exclude": _names,
    "calib": _calibration,
    "calib_tokens": _whole_number,
    "refine": _whole_number,
    "target_kl": _number,
    "base_rank": _whole_number,
    "keep": _number,
}
