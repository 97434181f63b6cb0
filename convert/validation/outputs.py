"""Running a model on a corpus: one prediction per position, or per row for classifiers, whatever the architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.validation.live_model import Task, is_out_of_memory
from adapt_convert.convert.validation.texts import Corpus, masked
from adapt_convert.formats.errors import AdaptError, first_line

IGNORED = -100  # a position without a target, as in `transformers`


@dataclass(frozen=True)
class Batch:
    """Rows of equal length: `inputs` for the model; `targets (rows, positions)` int64, `IGNORED` where there is none;
    `scored (rows, positions)` bool, or None when every position counts."""

    inputs: Mapping[str, Tensor]
    targets: Tensor | None
    scored: Tensor | None

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def length(self) -> int:
        """Tokens in a row that the model reads; 1 for an image."""
        ids = self.inputs.get("input_ids")
        return ids.shape[1] if ids is not None else 1


@dataclass(frozen=True)
class Predictions:
    """`values (items, classes)` are logits, or hidden features where `is_logits` is false; `targets (items,)` or None;
    `row (items,)` says to which row of the batch an item belongs."""

    values: Tensor
    targets: Tensor | None
    row: Tensor
    is_logits: bool


def longest(batches: Sequence[Batch]) -> Batch:
    """The first of the batches with the longest rows: short documents say little of how a model runs."""
    return max(batches, key=lambda batch: batch.length)


def make_batches(corpus: Corpus, task: Task, config: Mapping[str, Any], size: int, seed: int) -> list[Batch]:
    """The corpus in its order, consecutive rows of equal length together, at most `size` in a batch."""
    generator = torch.Generator().manual_seed(seed)
    mask_token = getattr(corpus.tokenizer, "mask_token_id", None)
    batches = []
    for _, group in groupby(corpus.rows, key=lambda row: row.shape):
        rows = list(group)
        for start in range(0, len(rows), size):
            batches.append(_batch(torch.stack(rows[start : start + size]), task, config, mask_token, generator))
    return batches


def _batch(rows: Tensor, task: Task, config: Mapping[str, Any], mask_token: int | None, generator: torch.Generator) -> Batch:
    if rows.is_floating_point():
        return Batch({"pixel_values": rows}, None, None)
    if task == "causal":
        return Batch({"input_ids": rows}, torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], IGNORED)], dim=1), None)
    if task == "seq2seq":  # the first half is read, the second half written
        half = max(1, rows.shape[1] // 2)
        first = config.get("decoder_start_token_id")
        start = torch.full_like(rows[:, :1], int(first if first is not None else config.get("pad_token_id") or 0))
        written = rows[:, half:]
        return Batch({"input_ids": rows[:, :half], "decoder_input_ids": torch.cat([start, written[:, :-1]], dim=1)}, written, None)
    if task == "masked" and mask_token is not None:
        pairs = [masked(row, mask_token, generator) for row in rows]
        chosen = torch.stack([positions for _, positions in pairs])
        return Batch({"input_ids": torch.stack([row for row, _ in pairs])}, rows, chosen)
    return Batch({"input_ids": rows}, None, None)


@torch.inference_mode()
def predict(model: Any, batch: Batch, device: torch.device, **options: Any) -> tuple[Predictions, Any]:
    """Run one batch. Returns the predictions that count, and the model's own output (for hidden states)."""
    output = run(model, batch, device, **options)
    return predictions_of(output, batch, device), output


def predictions_of(output: Any, batch: Batch, device: torch.device) -> Predictions:
    """The predictions that count in a model's output on a batch."""
    logits = getattr(output, "logits", None)
    is_logits = logits is not None and logits.shape[-1] > 1  # a regression head has one number, and no distribution
    values = logits if logits is not None else _features(output)
    values = values[:, None] if values.ndim == 2 else values
    values = values.flatten(1, -2)  # (rows, positions, classes)
    row = torch.arange(len(values), device=device)[:, None].expand(values.shape[:2])
    scored = batch.scored.to(device) if batch.scored is not None else torch.ones(values.shape[:2], dtype=torch.bool, device=device)
    targets = batch.targets.to(device)[scored] if batch.targets is not None and is_logits else None
    if batch.scored is None:  # no copy of what may be gigabytes
        return Predictions(values.reshape(-1, values.shape[-1]), targets, row.reshape(-1), is_logits)
    return Predictions(values[scored], targets, row[scored], is_logits)


def _features(output: Any) -> Tensor:
    for name in ("last_hidden_state", "start_logits", "image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if value is not None:
            return value[..., None] if name == "start_logits" else value  # type: ignore[no-any-return]
    raise AdaptError(f"{type(output).__name__} holds neither logits nor hidden states; this kind of model cannot be validated")


@torch.inference_mode()
def run(model: Any, batch: Batch, device: torch.device, **options: Any) -> Any:
    """The model's output on a batch, without gradients."""
    return call(model, batch, device, **options)


def call(model: Any, batch: Batch, device: torch.device, **options: Any) -> Any:
    """The model's output on a batch."""
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    try:
        return model(**inputs, **options)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # an input that is None, or of another shape
        if is_out_of_memory(error):
            raise
        raise AdaptError(f"{type(model).__name__} does not run on plain {', '.join(inputs)}: {first_line(error)[:200]}") from None


@torch.inference_mode()
def continue_greedily(model: Any, prompt: Tensor, count: int) -> Iterator[Tensor]:
    """The `count` most likely next tokens after `prompt (rows, length)`, one `(rows,)` at a time, with a key/value cache.

    No token ends it early, so that two models are compared over the same length. Raises `AdaptError` for a model that keeps
    no cache.
    """
    output = model(input_ids=prompt, use_cache=True)
    for step in range(count):
        token = output.logits[:, -1].argmax(-1)
        yield token
        if step + 1 < count:
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise AdaptError(f"{type(model).__name__} keeps no key/value cache")
            output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
