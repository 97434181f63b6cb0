"""What the tests of calibration and refinement share: token files, planted changes, and the KL by torch's own function."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_convert.convert.calibration.moments import Moments

# A model's memory is given back by a full collection, which goes through all that transformers has imported unless that is set aside.
gc.freeze()
atexit.register(gc.unfreeze)

ROWS, LENGTH = 40, 24
KEPT = "embed_tokens,lm_head,wte,input_layernorm,post_attention_layernorm,norm"  # what these tests leave as it is in the base


def token_file(path: Path, vocabulary: int = 96, rows: int = ROWS, seed: int = 0, skew: float = 4.0) -> Path:
    """Rows of random token ids as a .jsonl file; with a `skew` few of the tokens come often, as in text."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.linspace(0, skew, vocabulary - 3).exp()[torch.randperm(vocabulary - 3, generator=generator)]
    drawn = 3 + torch.multinomial(weights, rows * LENGTH, replacement=True, generator=generator).view(rows, LENGTH)
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in drawn.tolist()))
    return path


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Writing more into any file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def plant(model: Any, rank: int, only: Sequence[str] = ("proj",), scale: float = 0.05) -> None:
    """Change the linear layers named so by matrices of exactly this rank."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part in name for part in only):
            out, inner = module.weight.shape
            module.weight.data += scale * torch.randn(out, rank) @ torch.randn(rank, inner)


def stored_moments(cache: Path) -> Moments:
    """The moments that the one conversion of a test has left in its cache."""
    (directory,) = (cache / "moments").iterdir()
    return Moments(directory, json.loads((directory / "index.json").read_text()))


@torch.no_grad()
def kl(reference: Any, model: Any, rows: Tensor) -> float:
    """Mean `KL(reference || model)` over all positions, by `torch.nn.functional.kl_div`."""
    p, q = (each(input_ids=rows).logits.double().log_softmax(-1).flatten(0, 1) for each in (reference, model))
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
