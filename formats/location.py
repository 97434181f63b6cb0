"""From what a user types - a directory, a file or a Hub id - to a local directory."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_convert.formats.errors import AdaptError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WITH_REVISION = re.compile(rf"{HUB_ID.pattern}(@[\w./-]+)?", re.ASCII)
_FILE = re.compile(r"[^@]*\.(safetensors|bin|pt|pth|ckpt|gguf|json)")  # a mistyped path, rather than a repository
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_WEIGHTS = (
    [
        *("model.safetensors", "model-*.safetensors", "adapter_model.safetensors", "latte.safetensors", "shared_lora.safetensors"),
        "pytorch_lora_weights.safetensors",
    ],
    ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"],
)
# Of a diffusers pipeline every component has its own; the variants in half precision beside them are not needed.
_PIPELINE_WEIGHTS = [
    *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-*-of-*.safetensors"),
    *("*/model.safetensors", "*/model-*-of-*.safetensors"),
]
MAX_JSON = 256 * 2**20  # bytes; tokenizers reach tens of megabytes


@dataclass(frozen=True)
class Location:
    """`directory` holds the files; `file` is set when the user named one file; `name` is what to call it in a path."""

    origin: str
    directory: Path
    file: Path | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.loadable.rstrip("/").split("/")[-1] if self.is_hub else self._local_name()

    @property
    def is_hub(self) -> bool:
        return self.revision is not None

    @property
    def loadable(self) -> str:
        """What `from_pretrained` takes: the path, or the Hub id without its revision."""
        return self.origin.partition("@")[0] if self.is_hub else self.origin

    def _local_name(self) -> str:
        return (self.file.stem if self.file else self.directory.resolve().name) or "model"


def locate(origin: str | Path, revision: str | None = None) -> Location:
    """A local path, or else a Hub id of the form `org/name` or `org/name@revision`.

    The Hub is asked only for an id that is no local path, there or mistyped, and then only for the files that are read.
    Raises `AdaptError` when neither exists, or for a `revision` of what has none or names another.
    """
    text = str(origin)
    if not text:
        raise AdaptError("an empty path: no such file or directory")  # Path("") would be the working directory
    require_utf8(text)
    refuse_revision(text, revision)
    path = Path(origin).expanduser()
    if path.is_dir():
        return Location(text, path)
    if path.is_file():
        return Location(text, path.parent, path)
    if path.is_symlink():
        raise AdaptError(f"{text}: is a link to {os.readlink(path)}, where nothing is")
    if path.exists():
        raise AdaptError(f"{text}: is neither a file nor a directory")
    if not is_hub_id(text, revision):
        hint = f"if a Hub repository is meant, write {text}@main" if HUB_ID.fullmatch(text) else "a Hub id has the form org/name"
        raise AdaptError(f"{text}: no such file or directory ({hint})")
    repo, _, at = text.partition("@")
    return _from_hub(text, repo, at or revision)


def is_hub_id(text: str, revision: str | None = None) -> bool:
    """Whether a text has the form `org/name` or `org/name@revision`, and is no local path; nor, without a revision in it or beside it,
    ends like a file."""
    is_file = revision is None and _FILE.fullmatch(text) is not None
    return _WITH_REVISION.fullmatch(text) is not None and not is_file and not Path(text).exists()


def refuse_revision(origin: str, revision: str | None) -> None:
    """Refuse a revision that would be ignored: of a local path, or beside one in the id itself."""
    if revision is None:
        return
    if Path(origin).expanduser().exists():
        raise AdaptError(f"{origin}: is a local path, which has no revision {revision}")
    if "@" in origin:
        raise AdaptError(f"{origin}: names a revision itself, and {revision} was given beside it; give one")


def require_utf8(path: str) -> None:
    """Refuse a path that no text file could name: reports and cards are written in UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise AdaptError(f"{path}: the path is not valid UTF-8; rename it") from None


def _from_hub(origin: str, repo: str, revision: str | None) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from adapt_convert.formats.hub import FAILURES, check_token, hub_message  # here, as the Hub's client is asked only for a Hub id

    check_token(origin)
    try:
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=_SMALL_FILES))
        is_pipeline = (directory / "model_index.json").is_file()
        for patterns in (_PIPELINE_WEIGHTS,) if is_pipeline else _WEIGHTS:
            directory = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            if any(next(directory.glob(pattern), None) for pattern in patterns):
                break
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise AdaptError(f"{origin}: is neither a local path nor in the local Hub cache: {hub_message(error)}") from None
    except FAILURES as error:
        raise AdaptError(f"{origin}: is no local path and the Hub refused it: {hub_message(error)}") from None
    # In the cache a snapshot is stored under the commit it was resolved to.
    return Location(origin, directory, revision=directory.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; `AdaptError` when it is anything else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise AdaptError(f"{path}: is larger than {MAX_JSON} bytes, which no configuration is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdaptError(f"{path}: cannot be opened: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AdaptError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise AdaptError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value
