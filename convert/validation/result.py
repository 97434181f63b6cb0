"""The outcome of a validation, as a value: written as JSON, as a page, and into the model cards of the candidates."""

from __future__ import annotations

import json
import math
import platform
import shlex
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapt_convert.convert.validation.adapter_weights import RECORD, Holdings
from adapt_convert.convert.validation.attribution import NODES, Attribution
from adapt_convert.convert.validation.candidates import Contender
from adapt_convert.convert.validation.fidelity import Fidelity
from adapt_convert.convert.validation.speed import Speed
from adapt_convert.convert.validation.texts import Corpus
from adapt_convert.convert.validation.verdict import Thresholds
from adapt_convert.formats.atomic import write_text
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.validation_card import with_validation
from adapt_convert.formats.validation_html import validation_page

FILE = "validation.json"
_DISAGREEMENT = 0.25  # between captured energy and recovered output of one matrix
_PACKAGES = ("adapt-convert", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Judged:
    """One model of a validation: its figures, and the verdict (None for the base, which is not judged).

    `attribution` is the KL that it removes by parameter, or a line that says why that is not known.
    """

    contender: Contender
    fidelity: Fidelity
    greedy_agreement: float | None
    embedding_cosine: float | None
    attribution: Attribution | str | None
    hidden_error: dict[str, float]
    hidden_recovered: dict[str, float]
    output_recovered: dict[str, float]
    holdings: Holdings | None
    speed: Speed | None
    reasons: tuple[str, ...]
    passed: bool | None

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self.fidelity)
        return {
            "path": self.contender.path,
            "kind": self.contender.kind,
            **{name: figures.pop(name) for name in ("kl", "kl_ci95", "recovered", "top1", "perplexity")},
            "bytes": self.contender.bytes,
            "speed": self.speed.to_json() if self.speed else None,
            "passed": self.passed,
            "reasons": list(self.reasons),
            "details": {
                **figures,
                "task": self.contender.task,
                "greedy_agreement": self.greedy_agreement,
                "embedding_cosine": self.embedding_cosine,
                "hidden_error": self.hidden_error,
                "hidden_recovered": self.hidden_recovered,
                "attribution": self._attribution(),
                **self._weights(),
            },
        }

    def _attribution(self) -> dict[str, Any] | None:
        found = self.attribution
        if not isinstance(found, Attribution):
            return {"note": found} if found else None
        listed = self._matrices()
        others = {name: share for name, share in found.removed.items() if name not in listed}
        unplaced = others | {name: share for name, share in found.removed.items() if name in listed and listed[name].get("layer") is None}
        return {
            "sum": found.total,
            "measured": found.measured,
            "other": sum(others.values()),
            "largest_other": max(unplaced.items(), key=lambda pair: pair[1], default=None),
            "rows": found.rows,
            "tokens": found.tokens,
            "nodes": NODES,
            "note": found.note,
        }

    def _matrices(self) -> dict[str, dict[str, Any]]:
        """What is known of every matrix, by name."""
        matrices: dict[str, dict[str, Any]] = {}
        if self.holdings is not None:
            matrices |= {share.name: share.to_json() for share in self.holdings.matrices}
            matrices |= {name: {"captured_energy": share} for name, share in self.holdings.recorded.items()}
        shown = self.attribution.removed if isinstance(self.attribution, Attribution) and not self.attribution.note else {}
        for name, row in matrices.items():
            row["recovered_output"] = self.output_recovered.get(name.removesuffix(".weight"))
            row["recovered_kl"] = shown.get(name)
        return matrices

    def _weights(self) -> dict[str, Any]:
        if self.holdings is None:
            return {"captured_energy": None, "strength": None, "weights_note": None, "matrices": {}, "disagreements": []}
        matrices = self._matrices()
        apart = [
            (name, row["captured_energy"], row["recovered_output"])
            for name, row in matrices.items()
            if row["recovered_output"] is not None and abs(row["captured_energy"] - row["recovered_output"]) > _DISAGREEMENT
        ]
        apart.sort(key=lambda row: -abs(row[1] - row[2]))
        return {
            "captured_energy": self.holdings.captured,
            "strength": self.holdings.strength,
            "weights_note": self.holdings.note,
            "matrices": matrices,
            "disagreements": [{"matrix": name, "captured_energy": a, "recovered_output": b} for name, a, b in apart],
        }


@dataclass(frozen=True)
class Validation:
    """What `validate` returns. `passed` is the verdict of the worst candidate; `enlarged` from how many tokens the base was enlarged, and
    to how many, the fine-tune's."""

    base: Judged
    candidates: tuple[Judged, ...]
    fine_tune: Contender
    fine_tune_perplexity: float | None
    corpus: Corpus
    task: str
    model_class: str
    device: str
    dtype: str
    batch: int
    seed: int
    speed: bool
    attribution: bool
    thresholds: Thresholds
    spectra: dict[str, list[float]]
    top_k: int | None
    enlarged: tuple[int, int] | None

    @property
    def passed(self) -> bool:
        return all(candidate.passed for candidate in self.candidates)

    @property
    def failures(self) -> list[str]:
        """One line for every reason of every candidate that fails, each with its path, and its task in a bundle."""
        lines = []
        for row in self.candidates:
            path, task = row.contender.path, row.contender.task
            lines += [f"{path}{f' [{task}]' if task else ''}: {reason.removeprefix(f'{path}: ')}" for reason in row.reasons]
        return lines

    @property
    def warning(self) -> str | None:
        """Why the figures say little; None where nothing speaks against them."""
        return self.corpus.warning

    def to_json(self) -> dict[str, Any]:
        """Plain data as in `validation.json` (docs/validation.md); a number that is not finite is None."""
        data = {
            "base": self.base.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "fine_tune": {
                "path": self.fine_tune.path,
                "kind": self.fine_tune.kind,
                "perplexity": self.fine_tune_perplexity,
                "bytes": self.fine_tune.bytes,
            },
            "device": self.device,
            "dtype": self.dtype,
            "text": self.corpus.name,
            "tokens": self.corpus.tokens,
            "enlarged": self.enlarged,
            "warning": self.warning,
            "versions": _versions(),
            "passed": self.passed,
            "settings": {
                **{
                    "task": self.task,
                    "model_class": self.model_class,
                    "context": self.corpus.context,
                    "rows": len(self.corpus.rows),
                    "batch": self.batch,
                },
                **{"seed": self.seed, "threads": torch.get_num_threads(), "device_name": _device_name(self.device)},
                **{"top_k": self.top_k, "thresholds": asdict(self.thresholds)},
            },
            "spectra": self.spectra,
            "command": self.command,
        }
        finite: dict[str, Any] = _finite(data)
        return finite

    @property
    def command(self) -> str | None:
        """The command line that repeats this validation; None where the rows were given in Python."""
        if self.corpus.option is None:
            return None
        words = ["adapt-convert", "validate", self.base.contender.path, self.fine_tune.path]
        words += list(dict.fromkeys(row.contender.path for row in self.candidates))
        words += self.corpus.option
        if self.corpus.rows[0].ndim == 1:
            words += ["--context", str(self.corpus.context), "--max-tokens", str(self.corpus.tokens)]
        tasks = [row.contender.task for row in self.candidates if row.contender.task]
        words += ["--tasks", ",".join(dict.fromkeys(tasks))] if tasks else []
        words += ["--batch", str(self.batch), "--dtype", self.dtype, "--device", self.device, "--seed", str(self.seed)]
        for name, limit in asdict(self.thresholds).items():
            words += [f"--{name.replace('_', '-')}", str(limit)] if limit is not None else []
        words += ([] if self.speed else ["--no-speed"]) + ([] if self.attribution else ["--no-attribution"])
        return shlex.join(words)

    def save(self, directory: str | Path) -> Path:
        """Write `validation.json` into a directory, which is made if need be. Returns the file."""
        path = Path(directory) / FILE
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        return path

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained page."""
        write_text(Path(path), validation_page(self.to_json()))
        return Path(path)

    def update_cards(self) -> list[Path]:
        """Put the figures into the `README.md` of every candidate that this project wrote and that is not a Hub download.

        Raises `AdaptError` for the cards that could not be changed, after the others were.
        """
        written, refused = [], []
        data = self.to_json()
        for row, figures in zip(self.candidates, data["candidates"], strict=True):
            directory = row.contender.location.directory
            card = directory / "README.md"
            if row.contender.location.is_hub or not (directory / RECORD).is_file() or not card.is_file():
                continue
            try:
                write_text(card, with_validation(card.read_text(encoding="utf-8"), figures, data, row.contender.location.name))
                written.append(card)
            except (AdaptError, OSError, UnicodeDecodeError) as error:
                refused.append(str(error) if isinstance(error, AdaptError) else f"{card}: cannot be read: {error}")
        if refused:
            raise AdaptError("; ".join(refused))
        return written


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
