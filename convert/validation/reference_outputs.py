"""The fine-tune's outputs, computed once and kept on the disk, so that no two models have to be in memory together."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapt_convert.convert.validation.outputs import Predictions
from adapt_convert.formats.errors import AdaptError, first_line

FULL_LIMIT = 2 * 2**30  # bytes; above it only the largest logits are kept
TOP_K = 1024  # logits per prediction that are kept above the limit
_REMEDY = "set TMPDIR to a larger disk, or take fewer tokens"
CHUNK = 64  # predictions compared at a time: 64 x 150,000 classes in float64 are 77 MB


@dataclass(frozen=True)
class Comparison:
    """One batch of a model against the fine-tune, float64 per item `(items,)`.

    `divergence` is `KL(fine-tune || model)` in nats, or the squared distance of features. With top-k logits it is the
    divergence of the kept classes and "all others" as one: never above the true KL, and `upper` never below it; with full
    logits the two are equal. `agree` is 1 where the largest logit is the same. `nll` is the model's own negative log-likelihood
    of the target, NaN where there is none. `difference` is the largest absolute difference of a kept logit.
    """

    divergence: Tensor
    upper: Tensor
    agree: Tensor
    nll: Tensor
    difference: float


class ReferenceOutputs:
    """A temporary directory with one file per batch; a context manager that removes it.

    `expected_bytes` decides between full outputs, in the dtype in which they were computed, and the `top_k` largest logits
    with the log-sum-exp over all of them.
    """

    def __init__(self, expected_bytes: int, full_limit: int = FULL_LIMIT, top_k: int = TOP_K) -> None:
        self.top_k = top_k if expected_bytes > full_limit else None
        self._directory = Path(tempfile.mkdtemp(prefix="adapt-convert-validate-"))
        free = shutil.disk_usage(self._directory).free
        if not self.top_k and expected_bytes > free:
            self.close()
            raise AdaptError(f"{tempfile.gettempdir()}: {free} bytes free, {expected_bytes} needed for outputs; {_REMEDY}")

    def __enter__(self) -> ReferenceOutputs:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def keep(self, name: str, value: Tensor) -> None:
        """Store any tensor of the fine-tune under a name. Raises `AdaptError` when it cannot be written."""
        value = value.cpu()
        try:
            torch.save(value, self._path(name))
        except (OSError, RuntimeError) as error:  # the second is what `torch.save` makes of a full disk
            raise AdaptError(f"{tempfile.gettempdir()}: cannot be written ({first_line(error)}); {_REMEDY}") from None

    def fetch(self, name: str, device: torch.device) -> Tensor | None:
        path = self._path(name)
        value: Tensor | None = torch.load(path, weights_only=True, map_location=device) if path.is_file() else None
        return value

    def _path(self, name: str) -> Path:
        return self._directory / f"{name.replace('/', '_')}.pt"

    def keep_predictions(self, number: int, predictions: Predictions) -> Comparison:
        """Store a batch of the fine-tune; returns its comparison with itself, which holds its likelihoods."""
        values = predictions.values
        if self.top_k and predictions.is_logits and self.top_k < values.shape[1]:
            parts = [_summary(values[start : start + CHUNK], self.top_k) for start in range(0, len(values), CHUNK)]
            for field, pieces in zip(("top", "index", "sums"), zip(*parts, strict=True), strict=True):
                self.keep(f"{number}-{field}", torch.cat(pieces))
        else:
            self.keep(f"{number}-full", values)
        return self.compare(number, predictions)

    def compare(self, number: int, predictions: Predictions) -> Comparison:
        """A model's predictions on batch `number` against the fine-tune's."""
        values, device = predictions.values, predictions.values.device
        full = self.fetch(f"{number}-full", device)
        kept = [self.fetch(f"{number}-{field}", device) for field in ("top", "index", "sums")] if full is None else []
        parts = []
        for start in range(0, len(values), CHUNK):
            mine = values[start : start + CHUNK].double()
            piece = slice(start, start + CHUNK)
            if full is not None and not predictions.is_logits:
                row = _compare_features(full[piece].double(), mine)
            elif full is not None:
                row = _compare_full(full[piece].double(), mine)
            else:
                row = _compare_top([part[piece] for part in kept if part is not None], mine)
            targets = predictions.targets[piece] if predictions.targets is not None else None
            parts.append((*row, _likelihood(mine, targets)))
        divergence, upper, agree, difference, nll = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return Comparison(divergence, upper, agree, nll, float(difference.max()))


def total_divergence(reference: Tensor, mine: Tensor) -> float:
    """`KL(reference || mine)` of full logits `(items, classes)`, in nats, summed over the items."""
    pieces = zip(torch.split(reference, CHUNK), torch.split(mine, CHUNK), strict=True)
    return sum(float(_compare_full(a.double(), b.double())[0].sum()) for a, b in pieces)


_Row = tuple[Tensor, Tensor, Tensor, Tensor]  # divergence, upper, agree, difference: each (items,)


def widened(reference: Tensor, classes: int) -> Tensor:
    """Logits with the classes that only another model has: the fine-tune gives them no probability."""
    return torch.nn.functional.pad(reference, (0, max(0, classes - reference.shape[-1])), value=-torch.inf)


def _compare_full(reference: Tensor, mine: Tensor) -> _Row:
    known = reference.shape[-1]
    reference = widened(reference, mine.shape[-1])
    p, q = reference.log_softmax(-1), mine.log_softmax(-1)
    # A class that both exclude (logit -inf, padded vocabularies) adds nothing; left alone it would be 0 * NaN.
    kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    agree = (reference.argmax(-1) == mine.argmax(-1)).double()
    difference = torch.where(reference == mine, 0.0, (reference - mine).abs())[..., :known].amax(-1)
    return kl, kl, agree, difference


def _compare_features(reference: Tensor, mine: Tensor) -> _Row:
    distance = (reference - mine).square().sum(-1)
    return distance, distance, torch.full_like(distance, torch.nan), (reference - mine).abs().amax(-1)


def _summary(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits, their classes, and `(log-sum-exp, sum of p log p over the classes left out)`."""
    top, index = values.topk(k, dim=-1)
    p = values.double().log_softmax(-1)
    entropy = torch.where(p == -torch.inf, 0.0, p.exp() * p).scatter(-1, index, 0.0).sum(-1)
    return top, index.int(), torch.stack([values.double().logsumexp(-1), entropy], dim=-1)


def _compare_top(kept: list[Tensor], mine: Tensor) -> _Row:
    """Bounds of the KL from the k largest classes K of the fine-tune p, with q the model's probabilities.

    Below, by the log-sum inequality: `sum_K p log(p/q) + P log(P/Q)`, P and Q the mass outside K. Above: as q is known
    everywhere and `sum p log p` outside K was kept, only the cross term is not, and it is at most `-P min log q`.
    """
    top, index, sums = kept
    index = index.long()
    p, q_all = top.double() - sums[:, :1], mine.log_softmax(-1)
    q = q_all.gather(-1, index)
    head = (p.exp() * (p - q)).sum(-1)
    mass_p, mass_q = (1 - p.exp().sum(-1)).clamp_min(0), (1 - q.exp().sum(-1)).clamp_min(1e-30)
    lower = head + torch.where(mass_p > 0, mass_p * (mass_p / mass_q).log(), 0.0)
    smallest = q_all.scatter(-1, index, torch.inf).amin(-1)
    upper = head + sums[:, 1] - mass_p * smallest
    agree = (index[:, 0] == mine.argmax(-1)).double()
    return lower, torch.maximum(lower, upper), agree, (top.double() - mine.gather(-1, index)).abs().amax(-1)


def _likelihood(logits: Tensor, targets: Tensor | None) -> Tensor:
    if targets is None:
        return torch.full((len(logits),), torch.nan, dtype=torch.float64, device=logits.device)
    valid = targets >= 0
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(valid, -chosen, torch.nan)
