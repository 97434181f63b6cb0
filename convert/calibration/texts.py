"""The text that calibration fits to and is measured on: rows drawn from one corpus, some of them held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.validation.live_model import Task
from adapt_convert.convert.validation.outputs import Batch, make_batches
from adapt_convert.convert.validation.texts import Corpus, make_corpus
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location

ROW = 128  # tokens: rows of this length make many different contexts of a short text
BATCH = 512  # tokens
_HELD_OUT = 8  # one row of so many
_MOST_HELD_OUT = 4096  # tokens; more make a choice between candidates slower and hardly surer
_SPREAD = 16  # rows are drawn from so many times the tokens that are asked for


@dataclass(frozen=True)
class CalibrationText:
    """Batches to fit to, and other ones of the same corpus to choose and to stop by; `digest` names their tokens."""

    name: str
    fit: tuple[Batch, ...]
    heldout: tuple[Batch, ...]
    digest: str

    @property
    def tokens(self) -> int:
        return _tokens(self.fit)

    @property
    def heldout_tokens(self) -> int:
        return _tokens(self.heldout)


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.rows * batch.length for batch in batches)


def read_text(path: str, tokens: int, task: Task, config: Mapping[str, Any], locations: Sequence[Location], seed: int) -> CalibrationText:
    """`tokens` tokens of a file of text (plain or .jsonl) or of token ids (.jsonl with `input_ids`), drawn with `seed`.

    Raises `AdaptError` for a file that cannot be read, holds no text, or too little to hold a part of it out.
    """
    file = Path(path)
    ids = _holds_token_ids(file)
    try:
        corpus = make_corpus(task, config, locations, None if ids else file, file if ids else None, None, _SPREAD * tokens)
    except AdaptError as error:
        raise AdaptError(str(error).replace("--token-ids", "--calib")) from None
    return split(corpus, tokens, task, config, seed)


def _holds_token_ids(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    try:
        with path.open(encoding="utf-8") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError):
        return False  # the reader of text says what is wrong
    return isinstance(row, dict) and "input_ids" in row


def split(corpus: Corpus, tokens: int, task: Task, config: Mapping[str, Any], seed: int) -> CalibrationText:
    """Rows of at most `ROW` tokens in a random order: the first to hold out, the others, up to `tokens` of both, to fit to."""
    rows = [part for row in corpus.rows for part in (torch.split(row, ROW) if row.ndim == 1 else (row,)) if len(part) > 1]
    if len(rows) == 1 and rows[0].ndim == 1:
        rows = [part for part in torch.split(rows[0], max(2, len(rows[0]) // _HELD_OUT)) if len(part) > 1]
    if len(rows) < 2:
        raise AdaptError(f"--calib {corpus.name}: has a single row of {corpus.tokens} tokens; two are needed, one of them to hold out")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]
    chosen = _first(shuffled, tokens)
    chosen = chosen if len(chosen) > 1 else shuffled[:2]
    held = _first(chosen, min(_MOST_HELD_OUT, sum(map(_length, chosen)) // _HELD_OUT))
    parts = [tuple(_batches(part, corpus, task, config, seed)) for part in (chosen[len(held) :], held)]
    return CalibrationText(corpus.name, parts[0], parts[1], _digest(chosen))


def _length(row: Tensor) -> int:
    return len(row) if row.ndim == 1 else 1


def _first(rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Rows of together at most `tokens`, but at least one."""
    kept, total = [rows[0]], _length(rows[0])
    for row in rows[1:]:
        total += _length(row)
        if total > tokens:
            break
        kept.append(row)
    return kept


def _batches(rows: list[Tensor], corpus: Corpus, task: Task, config: Mapping[str, Any], seed: int) -> list[Batch]:
    rows = sorted(rows, key=len, reverse=True)  # rows of one length make a batch
    size = max(1, BATCH // max(_length(row) for row in rows))
    return make_batches(Corpus(corpus.name, tuple(rows), corpus.context, corpus.tokenizer), task, config, size, seed)


def _digest(rows: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(f"{list(row.shape)}".encode() + row.contiguous().numpy().tobytes())
    return total.hexdigest()
