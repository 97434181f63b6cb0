"""Calibration without data: text that the fine-tune itself writes, from where it and the base disagree most."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.architectures import vocabulary_of
from adapt_convert.convert.calibration.teacher import divergence, targets_of
from adapt_convert.convert.calibration.texts import ROW, CalibrationText, split
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.validation.candidates import Stage
from adapt_convert.convert.validation.live_model import Task, positions_of
from adapt_convert.convert.validation.outputs import Batch, make_batches, predict
from adapt_convert.convert.validation.texts import Corpus
from adapt_convert.formats.errors import AdaptError

_FIRST_TOKENS = 4096  # of the vocabulary, drawn at random, that are looked at
_LOOKED_AT = 256  # at a time
_CONTROL_ROWS, _CONTROL_LENGTH = 16, 64  # rows and tokens: enough to see what is a tenth worse, and soon written
_ROWS = 64  # written at a time: one reading of the weights serves all of them


def sample_text(stage: Stage, tokens: int, task: Task, config: Mapping[str, Any], seed: int, progress: Progress) -> CalibrationText:
    """`tokens` tokens written by the fine-tune at temperature 1, in rows of `ROW` tokens.

    Every row starts with another token of the vocabulary, one of those behind which `KL(fine-tune || base)` of the next token is
    largest. Raises `AdaptError` for a model that does not write.
    """
    vocabulary = vocabulary_of(config)
    if task != "causal" or vocabulary is None:
        raise AdaptError(f"--calib self: a {config.get('model_type')} of this class writes no text; give --calib FILE")
    generator = torch.Generator().manual_seed(seed)
    length = min(ROW, positions_of(config) or ROW)
    count = max(2, tokens // length)
    firsts = torch.randperm(vocabulary, generator=generator)[:_FIRST_TOKENS]
    firsts = firsts[_disagreement(stage, firsts, progress).argsort(descending=True)]
    prompts = firsts[: len(firsts) // 2].repeat(-(-2 * count // len(firsts)))[:count]
    stage.show(stage.fine_tune)
    rows = torch.cat([_write(stage, part, length, generator) for part in progress(torch.split(prompts, _ROWS), "writing text")])
    corpus = Corpus(f"written by the fine-tune (seed {seed})", tuple(rows), length)
    return split(corpus, tokens, task, config, seed)


def control_rows(stage: Stage, task: Task, config: Mapping[str, Any], seed: int, progress: Progress) -> list[Batch]:
    """A few rows that belong to no text: what the fine-tune writes behind random first tokens; from other models, random tokens alone."""
    vocabulary = vocabulary_of(config) or 2
    length = min(_CONTROL_LENGTH, positions_of(config) or _CONTROL_LENGTH)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randint(vocabulary, (_CONTROL_ROWS, length), generator=generator)
    if task == "causal":
        stage.show(stage.fine_tune)
        with contextlib.suppress(AdaptError):  # of a model without a cache, as Mamba: it writes none
            rows = torch.cat([_write(stage, part, length, generator) for part in progress((rows[:, 0],), "writing control rows")])
    return make_batches(Corpus("control", tuple(rows), length), task, config, _CONTROL_ROWS // 2, seed)


def _disagreement(stage: Stage, firsts: Tensor, progress: Progress) -> Tensor:
    """`KL(fine-tune || base)` of what follows each of the tokens, `(tokens,)`."""
    batches = [Batch({"input_ids": part[:, None]}, None, None) for part in torch.split(firsts, _LOOKED_AT)]
    stage.show(stage.fine_tune)
    targets = targets_of(stage.model, progress(batches, "fine-tune on first tokens"), stage.device)
    stage.show(stage.base)
    found = []
    for batch, target in zip(progress(batches, "base on first tokens"), targets, strict=True):
        found.append(divergence(target, predict(stage.model, batch, stage.device)[0]).cpu())
    return torch.cat(found)


@torch.inference_mode()
def _write(stage: Stage, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """`(rows, length)` tokens that begin with `prompts (rows,)`, each drawn from the model's own distribution, on the CPU.

    The draws are made on the CPU, so that a seed means the same on every device. No token ends a row early.
    """
    rows = [prompts]
    cache = None
    while len(rows) < length:
        output = stage.model(input_ids=rows[-1][:, None].to(stage.device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise AdaptError(f"--calib self: {type(stage.model).__name__} keeps no key/value cache; give --calib FILE")
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        rows.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    return torch.stack(rows, dim=1)
