"""What the models are run on: text, token ids or, for want of anything else, something built in and named as such."""

from __future__ import annotations

import json
import operator
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.architectures import vocabulary_of
from adapt_convert.convert.validation.live_model import Task, positions_of, quiet
from adapt_convert.formats.errors import AdaptError, first_line
from adapt_convert.formats.location import Location

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
DEFAULT_CONTEXT = 256  # tokens
DEFAULT_MAX_TOKENS = 16384
ENOUGH_TOKENS = 256  # fewer make figures that another sample would not repeat
_CHARACTERS_PER_TOKEN = 12  # no tokenizer makes fewer tokens of text than this; more text than needed is not tokenised
_IMAGES = 16
_MASKED_SHARE = 0.15  # as BERT was trained
JOIN = "\n\n"


@dataclass(frozen=True)
class Corpus:
    """`rows` are sequences of token ids (int64, at most the context long), or images `(channels, height, width)` float32. `option` is
    what chooses them on the command line; None for rows given in Python."""

    name: str
    rows: tuple[Tensor, ...]
    context: int
    tokenizer: Any = None
    option: tuple[str, ...] | None = ()

    @property
    def tokens(self) -> int:
        """Token positions fed to the models; for images their number."""
        return sum(len(row) if row.ndim == 1 else 1 for row in self.rows)

    @property
    def warning(self) -> str | None:
        """Why figures on these rows say little; None for enough of them."""
        if self.rows[0].ndim > 1 or (self.tokens >= ENOUGH_TOKENS and len(self.rows) > 1):
            return None
        rows = "a single row" if len(self.rows) == 1 else f"{len(self.rows)} rows"
        return f"only {self.tokens} tokens in {rows} were run: the figures say little of other text; give more with --text or --token-ids"


def built_in_text() -> tuple[str, str]:
    """Name and text of the corpus that every Python ships: its language reference."""
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise AdaptError("this Python ships without pydoc_data, the built-in text; give --text or --token-ids") from None
    name = f"built-in: Python {platform.python_version()} language reference (pydoc_data.topics)"
    return name, JOIN.join(topics[key] for key in sorted(topics))


def read_documents(path: Path) -> list[str]:
    """The documents of a plain text file (one) or of a .jsonl file (one a line, under `text`). Raises `AdaptError`."""
    text = _read(path)
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, row in _json_lines(path, text):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise AdaptError(f'{path}, line {number}: expected {{"text": "..."}}')
        documents.append(row["text"])
    return documents


def read_token_ids(path: Path) -> list[list[int]]:
    """The rows of a .jsonl file of `{"input_ids": [...]}`. Raises `AdaptError` naming the line."""
    rows = []
    for number, row in _json_lines(path, _read(path)):
        ids = row.get("input_ids") if isinstance(row, dict) else None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise AdaptError(f'{path}, line {number}: expected {{"input_ids": [1, 2, ...]}}, whole numbers of at least 0')
        rows.append(ids)
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AdaptError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AdaptError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _json_lines(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise AdaptError(f"{path}, line {number}: is not valid JSON") from None


def make_corpus(
    task: Task,
    config: Mapping[str, Any],
    locations: Sequence[Location],
    text: str | Path | None,
    token_ids: str | Path | Sequence[Sequence[int]] | None,
    context: int | None,
    max_tokens: int,
) -> Corpus:
    """The rows to run a model of `config` on.

    One stream of text is cut into whole blocks of `context` tokens (a rest is left out). A row of `token_ids`, and a line of
    a .jsonl for models that read documents (encoders, classifiers), is a row of its own; a longer one is cut like a stream.
    `locations` are searched for a tokenizer in order. Raises `AdaptError`.
    """
    if text is not None and token_ids is not None:
        raise AdaptError("--text and --token-ids contradict each other; give one")
    option: tuple[str, ...] | None = None
    if token_ids is not None:
        is_file = isinstance(token_ids, str | Path)
        rows = read_token_ids(Path(token_ids)) if isinstance(token_ids, str | Path) else _checked_rows(token_ids)
        name, documents, tokenizer = str(token_ids) if is_file else "token ids", True, None
        option = ("--token-ids", name) if is_file else None
    else:
        name, texts = (str(text), read_documents(Path(text))) if text is not None else _as_documents(built_in_text())
        option = ("--text", name) if text is not None else ()
        texts = [each for each in texts if each.strip()]
        if not texts:
            raise AdaptError(f"{name}: holds no text")
        documents = text is not None and Path(text).suffix == ".jsonl" and task not in ("causal", "seq2seq")
        tokenizer = load_tokenizer(locations)
        budget = _CHARACTERS_PER_TOKEN * max_tokens
        pieces = texts if documents else [JOIN.join(texts)[:budget]]
        with quiet():  # a stream longer than the model's context is what is wanted here
            rows = [list(tokenizer(piece)["input_ids"]) for piece in pieces]
    length = _context_for(context, config, max((len(row) for row in rows), default=0), name)
    blocks = _cut(rows, length, keep_short=documents)
    _check_ids(blocks, config, name)
    kept = blocks[: max(1, max_tokens // length)] if not documents else _first_tokens(blocks, max_tokens)
    return Corpus(name, tuple(torch.tensor(block) for block in kept), length, tokenizer, option)


def _checked_rows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows given in Python, of whatever counts as a whole number there."""
    try:
        checked = [[operator.index(token) for token in row] for row in rows]
    except TypeError:
        raise AdaptError("token_ids: expected rows of whole numbers, like [[1, 2, 3], [4, 5]]") from None
    if any(token < 0 for row in checked for token in row):
        raise AdaptError("token_ids: holds a negative number; leave padding out")
    return checked


def _as_documents(named: tuple[str, str]) -> tuple[str, list[str]]:
    return named[0], [named[1]]


def noise_images(config: Mapping[str, Any], seed: int) -> Corpus:
    """Images of seeded normal noise for vision models, named as such: this project ships no photographs."""
    size, channels = config.get("image_size", 224), config.get("num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(seed)
    rows = tuple(torch.randn(channels, height, width, generator=generator) for _ in range(_IMAGES))
    return Corpus(f"built-in: {_IMAGES} images of normal noise (seed {seed})", rows, 1)


def has_tokenizer(location: Location) -> bool:
    return any((location.directory / name).is_file() for name in _TOKENIZERS)


def load_tokenizer(locations: Sequence[Location]) -> Any:
    """The first tokenizer found in `locations`. Raises `AdaptError` pointing to --token-ids."""
    from transformers import AutoTokenizer

    for location in locations:
        if has_tokenizer(location):
            try:
                with quiet():
                    return AutoTokenizer.from_pretrained(location.directory, local_files_only=True)
            except Exception as error:  # whatever a tokenizer's own reader raises
                raise AdaptError(
                    f"{location.origin}: its tokenizer cannot be loaded ({first_line(error)[:200]}); use --token-ids F.jsonl"
                ) from None
    where = " or ".join(location.origin for location in locations)
    raise AdaptError(f'{where}: no tokenizer in it; put one there, or give --token-ids F.jsonl with {{"input_ids": [...]}} lines')


def _context_for(asked: int | None, config: Mapping[str, Any], longest: int, name: str) -> int:
    limit = positions_of(config)
    if asked is None:
        if longest < 2:
            raise AdaptError(f"{name}: has {longest} tokens; at least 2 are needed")
        return min(DEFAULT_CONTEXT, longest, limit or DEFAULT_CONTEXT)
    if asked < 2:
        raise AdaptError(f"--context {asked}: must be at least 2 tokens")
    if limit is not None and asked > limit:
        raise AdaptError(f"--context {asked}: the model has {limit} positions; lower --context")
    if longest < asked:
        raise AdaptError(f"{name}: has {longest} tokens, fewer than --context {asked}; give more text or lower --context")
    return asked


def _cut(rows: Iterable[list[int]], context: int, keep_short: bool) -> list[list[int]]:
    blocks: list[list[int]] = []
    for row in rows:
        whole = [row[start : start + context] for start in range(0, len(row) - context + 1, context)]
        blocks += whole or ([row] if keep_short and len(row) > 1 else [])
    return blocks


def _first_tokens(blocks: list[list[int]], max_tokens: int) -> list[list[int]]:
    kept: list[list[int]] = []
    total = 0
    for block in blocks:
        if kept and total + len(block) > max_tokens:
            break
        kept.append(block)
        total += len(block)
    return kept


def _check_ids(blocks: list[list[int]], config: Mapping[str, Any], name: str) -> None:
    vocabulary = vocabulary_of(config)
    largest = max((max(block) for block in blocks), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise AdaptError(f"{name}: holds token {largest}, but the model knows {vocabulary} tokens; is this its tokenizer?")


def masked(row: Tensor, mask_token: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`row` with 15 % of its tokens masked, at least one, and the boolean positions of those; special ends stay."""
    chosen = torch.rand(len(row), generator=generator) < _MASKED_SHARE
    chosen[0] = chosen[-1] = False
    if not chosen.any():
        chosen[len(row) // 2] = True
    return torch.where(chosen, mask_token, row), chosen
