"""What may go out: whole adapters alone, and of local paths their last component."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.gguf_header import read_gguf_header
from adapt_convert.formats.location import is_hub_id, read_json
from adapt_convert.formats.loda_config import VARIANTS
from adapt_convert.formats.profiles import GGUF_WEIGHTS

# Weights and config that belong together.
PEFT = ("adapter_model.safetensors", "adapter_config.json")
LATTE = ("latte.safetensors", "latte_config.json")
SHARED_LORA = ("shared_lora.safetensors", "shared_lora_config.json")
GGUF = (GGUF_WEIGHTS,)
IMAGE = ("pytorch_lora_weights.safetensors", "lora.safetensors")  # each alone
_OF_TARGET = {"lora": PEFT, "lorta": PEFT, "latte": LATTE, "shared-lora": SHARED_LORA, **dict.fromkeys(VARIANTS, PEFT)}


@dataclass(frozen=True)
class Report:
    """What publishing needs of `conversion.json`; `local` are the inputs that were no Hub models, text among them; `layout` is a
    consumer's own."""

    target: str
    layout: str | None
    bytes: int
    base_is_local: bool
    local: tuple[str, ...]

    @staticmethod
    def read(path: Path) -> Report:
        """Raises `AdaptError` for a report that no conversion has written."""
        data = read_json(path)
        if data.get("target") == "merged":
            raise AdaptError(f"{path.parent}: is a merged model, and only adapters are published; upload it with `hf upload`")
        try:
            inputs = data["inputs"]
            base, sources = inputs["base"], inputs.get("sources", [inputs["source"]])  # a bundle has several
            local = tuple(side["origin"] for side in (base, *sources) if side["revision"] is None)
            text = data.get("options", {}).get("calib")
            local += (text,) if text is not None else ()
            layout = (data.get("profile") or {}).get("layout")
            report = Report(data["target"], layout, data["bytes"], base["revision"] is None, local)
        except (KeyError, TypeError, AttributeError):
            raise AdaptError(f"{path}: is not a report that adapt-convert writes") from None
        sound = isinstance(report.bytes, int) and all(isinstance(origin, str) for origin in local)
        if not (sound and isinstance(report.target, str) and report.target in _OF_TARGET):
            raise AdaptError(f"{path}: is not a report that adapt-convert writes")
        return report


def check_adapter(directory: Path, report: Report | None) -> None:
    """Refuse a directory whose adapter is not whole: weights, the config that goes with them, and the size in the report."""
    from adapt_convert.formats.safetensors_file import SafetensorsFile  # imports torch

    images = [(name,) for name in IMAGE]
    kinds: list[tuple[str, ...]] = [PEFT, LATTE, SHARED_LORA, GGUF, *images]
    if report:
        kinds = [GGUF] if report.layout == "gguf" else [_OF_TARGET[report.target], *(images if report.target == "lora" else [])]
    names = next((names for names in kinds if (directory / names[0]).is_file()), None)
    if names is None:
        expected = " or ".join(names[0] for names in kinds)
        raise AdaptError(f"{directory}: holds no adapter ({expected}); there is nothing to push")
    weights, *configs = (directory / name for name in names)
    for config in configs:
        read_json(config)
    if names == GGUF:
        read_gguf_header(weights)
    else:
        SafetensorsFile(weights)
    size = weights.stat().st_size
    if report and size != report.bytes:
        raise AdaptError(f"{weights}: has {size} bytes, and conversion.json speaks of {report.bytes}; convert it again")


def private_paths(report: Report | None, validation: Mapping[str, Any]) -> list[str]:
    """The local paths that a directory's files name."""
    candidates = validation.get("candidates")
    sides = [validation.get("base"), validation.get("fine_tune"), *(candidates if isinstance(candidates, list) else [])]
    models = [path for side in sides if isinstance(side, dict) and isinstance(path := side.get("path"), str)]
    named = [*(report.local if report else ()), *(path for path in models if not is_hub_id(path))]
    if isinstance(text := validation.get("text"), str) and not text.startswith("built-in"):
        named.append(text)
    return [path for path in dict.fromkeys(named) if "/" in path]


def without_paths(text: str, paths: list[str]) -> str:
    """The text of a card or a JSON file with the last component of each path in place of the path."""
    for path in sorted(paths, key=len, reverse=True):
        name = Path(path).expanduser().resolve().name
        for written, short in ((path, name), (json.dumps(path)[1:-1], json.dumps(name)[1:-1])):
            text = re.sub(rf"(?<![\w./~-]){re.escape(written)}(?![\w.-])", lambda _, short=short: short, text)  # type: ignore[misc]
    return text
