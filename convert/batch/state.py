"""What a batch remembers of a job between runs: what it was made from, and how far it came."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adapt_convert.convert.batch.manifest import Job
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.location import Location

HIDDEN = ".adapt-convert"  # below the batch's directory
# Beside the weights these decide what a conversion writes: the last one for the licence in the card.
_SMALL = ("config.json", "adapter_config.json", "latte_config.json", "README.md")
_MADE = ("*.safetensors", "*_config.json", "conversion.json")


@dataclass(frozen=True)
class Identity:
    """What an input is: the commit of a Hub model; else its small files by content and its weights by size and time.

    `weights` is the SHA-256 of all tensors, known once they were read: it settles whether weights whose time has changed have
    changed themselves.
    """

    revision: str | None
    small: str
    files: tuple[tuple[str, int, int, int], ...]
    weights: str | None = None

    @staticmethod
    def of(location: Location) -> Identity:
        small = hashlib.sha256()
        for name in _SMALL:
            path = location.directory / name
            small.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else '-'}\n".encode())
        files = []
        for path in weight_files(location):
            found = path.stat()
            files.append((path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return Identity(location.revision, small.hexdigest(), tuple(files))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Identity:
        return Identity(data["revision"], data["small"], tuple(tuple(row) for row in data["files"]), data["weights"])

    def is_still(self, now: Identity, location: Location) -> bool:
        """Whether the input is what it was; reads the weights only where size and time leave a doubt."""
        if self.revision is not None or now.revision is not None:
            return self.revision == now.revision
        if self.small != now.small:
            return False
        return self.files == now.files or (self.weights is not None and TensorStore(weight_files(location)).content_hash() == self.weights)


class JobState:
    """The hidden directory of one job: `state.json`, the pieces of an unfinished conversion, and what is not published yet."""

    def __init__(self, root: Path, job: Job) -> None:
        self.output = root / job.output
        self.directory = root / HIDDEN / "jobs" / quote(job.output, safe="")
        self._file = self.directory / "state.json"

    def read(self) -> dict[str, Any] | None:
        """What was recorded last; None when there is nothing that can be used."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and {"settings", "base", "source"} <= set(state) else None

    def write(self, state: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(state, indent=1) + "\n")

    def restart(self) -> None:
        """Forget everything that an earlier run has left, but for its output."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def clean(self) -> None:
        """Of a finished job the record alone is kept."""
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def output_files(self) -> dict[str, int]:
        """Sizes of what the job has written; a card or a later validation is its owner's to change."""
        names = sorted(path for pattern in _MADE for path in self.output.glob(pattern))
        return {path.name: path.stat().st_size for path in names}


def settings_of(job: Job) -> dict[str, Any]:
    """Options, and the versions that a result depends on."""
    return job.settings() | {"versions": {name: version(name) for name in ("adapt-convert", "torch")}}


def write_whole(path: Path, text: str) -> None:
    """A small file, whole or as it was before."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
