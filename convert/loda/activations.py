"""The activations that matrices are fitted to, a few matrices' at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.calibration.activations import captured_inputs, groups_within
from adapt_convert.convert.calibration.judge import Judge
from adapt_convert.convert.loda.fit import Activations
from adapt_convert.convert.preflight import Entry
from adapt_convert.convert.validation.outputs import Batch

_HELD = 2**29  # bytes of activations in memory, unless those of one matrix alone are more
_MOST_FITTED = 8192  # tokens: some times the widths at hand, and more change a fit little


def activations_of(judge: Judge, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Activations]]:
    """Each matrix of `entries`, in order, with what the fine-tune feeds it on the judge's text. The text is run once for as many
    matrices as memory holds.

    Raises `AdaptError` for a matrix that takes no part when the model runs.
    """
    stage, text = judge.stage, judge.text
    fitted = _first(text.fit, _MOST_FITTED)
    tokens = sum(batch.rows * batch.length for batch in (*fitted, *text.heldout))
    for group in groups_within(entries, lambda entry: 4 * tokens * entry.matrix_shape[1], _HELD):
        stage.show(stage.fine_tune)
        modules = [entry.module for entry in group]
        fit = _inputs(stage.root, modules, fitted, stage.device)
        heldout = _inputs(stage.root, modules, text.heldout, stage.device)
        for entry in group:
            yield entry, Activations(fit[entry.module], heldout[entry.module])


def _first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    kept: list[Batch] = []
    for batch in batches:
        kept.append(batch)
        tokens -= batch.rows * batch.length
        if tokens <= 0:
            break
    return kept


def _inputs(model: Any, modules: Sequence[str], batches: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """The inputs of each module on all batches, `(tokens, in)` float32; modules that share an input share the tensor."""
    pieces: dict[str, list[Tensor]] = {module: [] for module in modules}
    for held in captured_inputs(model, modules, batches, device):
        converted: dict[int, Tensor] = {}
        for module, x in held.items():
            pieces[module].append(converted.setdefault(x.data_ptr(), x.float()))
    joined: dict[tuple[int, ...], Tensor] = {}
    inputs = {}
    for module, parts in pieces.items():
        key = tuple(map(id, parts))
        if key not in joined:
            joined[key] = torch.cat(parts)
        inputs[module] = joined[key]
    return inputs
