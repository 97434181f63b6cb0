"""What a batch remembers of a job between runs: what it was made from, and how far it came."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapt_convert.convert.batch.job import Job
from adapt_convert.formats.atomic import write_text
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location

HIDDEN = ".adapt-convert"  # below the batch's directory
SUMMARY, LOG, INDEX = "batch.json", "batch.jsonl", "index.html"
REPORT = "conversion.json"
# Beside the weights these decide what a conversion writes: the last one for the licence in the card.
_SMALL = ("config.json", "adapter_config.json", "latte_config.json", "README.md")
_MADE = ("*.safetensors", "*_config.json", REPORT)
_CARD = "README.md"
_LATER = ("validation.json", "validation.html")
_SLUG = 60  # characters


@dataclass(frozen=True)
class Identity:
    """What an input is: the commit of a Hub model; else its small files by content and its weights by size and time.

    `weights` is the BLAKE3 hash of all tensors, known once they were read: it settles whether weights whose time has changed have
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
        # A name of its own for every output, that is short whatever the output is called.
        slug = re.sub(r"[^\w.-]+", "-", job.output, flags=re.ASCII)[:_SLUG]
        self.directory = root / HIDDEN / "jobs" / f"{slug}-{hashlib.sha256(job.output.encode()).hexdigest()[:16]}"
        self._file = self.directory / "state.json"

    def read(self) -> dict[str, Any] | None:
        """What was recorded last; None when there is nothing that can be used."""
        try:
            state: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            for role in ("base", "source"):
                Identity.from_json(state[role])
            sound = isinstance(state["settings"], dict) and all(isinstance(digest, str) for digest in state["files"].values())
            return state if sound and ("result" not in state or _is_result(state["result"], state["copied_to"])) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, state: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(state, indent=1) + "\n")

    def clean(self) -> None:
        """Remove all that an earlier run has left but the record, which alone says that the output is ours."""
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def refuse_foreign(self) -> None:
        """Refuse to replace an output that holds what this job has not written. Raises `AdaptError`."""
        record = self.read()
        if record is None or not self.output.exists() or not any(self.output.iterdir()):
            return  # without a record `check_destination` has decided
        written = record["files"]
        names = sorted(path.name for path in self.output.iterdir())
        # A validation that was killed may have left half a file, hidden under the name it was to have.
        halves = tuple(f".{name}." for name in (_CARD, *_LATER))
        extra = [name for name in names if name not in {*written, *_LATER} and not name.startswith(halves)]
        if extra:
            raise AdaptError(f"{self.output}: is out of date, but holds {extra[0]}, which is not this batch's; move it, or set overwrite")
        if files_of(self.output).get(REPORT) != written.get(REPORT):
            raise AdaptError(f"{self.output}: is out of date, but was replaced by another run; move it, or set overwrite")


def files_of(output: Path) -> dict[str, str]:
    """SHA-256 of what a job has written, by name. Of the card only that it is there: its text is its owner's to change."""
    made = sorted(path for pattern in _MADE for path in output.glob(pattern))
    card = {_CARD: "present"} if (output / _CARD).is_file() else {}
    return {path.name: _file_hash(path) for path in made if path.is_file()} | card


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_result(result: dict[str, Any], copied_to: object) -> bool:
    """Whether it has what a summary needs."""
    numbers = isinstance(result["bytes"], int) and isinstance(result["captured_energy"], float | int | None)
    return numbers and isinstance(result["status"], str) and isinstance(result["passed"], bool | None) and isinstance(copied_to, str | None)


def settings_of(job: Job) -> dict[str, Any]:
    """Options, and the versions that a result depends on."""
    return job.settings() | {"versions": {name: version(name) for name in ("adapt-convert", "torch")}}
