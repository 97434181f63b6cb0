"""The fine-tune's predictions, kept small enough to stay in memory, and the divergence from them that gradients flow through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.validation.outputs import Batch, Predictions, call, predictions_of

TOP = 512  # classes kept of each prediction, and "all others" as one
_TINY = 1e-20


@dataclass(frozen=True)
class Target:
    """What the fine-tune predicts on one batch: its `top (items, k)` log-probabilities and their classes `index`, or, for a model without
    a distribution, its features as `top` and no index."""

    top: Tensor
    index: Tensor | None


def targets_of(model: Any, batches: Iterable[Batch], device: torch.device) -> list[Target]:
    """The targets of all batches, on the CPU: of a row of text `8 TOP` bytes a token."""
    with torch.no_grad():
        return [_target(predictions_of(call(model, batch, device), batch, device)) for batch in batches]


def _target(predictions: Predictions) -> Target:
    values = predictions.values.float()
    if not predictions.is_logits:
        return Target(values.cpu(), None)
    top, index = values.topk(min(TOP, values.shape[1]), dim=-1)
    return Target((top - values.logsumexp(-1, keepdim=True)).cpu(), index.int().cpu())


def divergence(target: Target, predictions: Predictions) -> Tensor:
    """`KL(fine-tune || model)` of each item, `(items,)` nats, or the squared distance of features.

    The classes outside the fine-tune's `TOP` count as one, which is never above the KL of all classes (log-sum inequality).
    """
    values = predictions.values.float()
    top = target.top.to(values.device)
    if target.index is None:
        return (top - values).square().sum(-1)
    q = values.gather(-1, target.index.to(values.device, torch.int64)) - values.logsumexp(-1, keepdim=True)
    p = top.exp()
    found = (p * (top - q)).sum(-1)
    if top.shape[1] == values.shape[1]:
        return found
    rest_p, rest_q = ((1 - part.sum(-1)).clamp_min(_TINY) for part in (p, q.exp()))
    return found + rest_p * (rest_p / rest_q).log()


def mean_divergence(model: Any, batches: Sequence[Batch], targets: Sequence[Target], device: torch.device) -> float:
    """The mean of `divergence` over all predictions of the batches, without gradients."""
    total, items = 0.0, 0
    with torch.no_grad():
        for batch, target in zip(batches, targets, strict=True):
            found = divergence(target, predictions_of(call(model, batch, device), batch, device))
            total, items = total + float(found.double().sum()), items + len(found)
    return total / items
