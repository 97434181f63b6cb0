"""R-LoDA and S-LoDA: a cheaper weight in the place of the base's, whose error the adapter absorbs as far as its rank goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta
from adapt_convert.convert.loda.fit import Activations, best_lora
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry


_ROLES = ("q", "k", "v", "qkv")  # the paper's W_proj


def is_replaced(entry: Entry, options: Options) -> bool:
    """Whether R- or S-LoDA replaces a matrix: q, k and v, or whatever --target-modules names."""
    if options.base_rank is None and options.keep is None:
        return False
    return bool(options.target_modules) or (entry.place is not None and entry.place.role in _ROLES)


@dataclass(frozen=True)
class Replacement:
    """What stands for a weight `(out, in)`: `base` of low rank or the entries to `keep`, and `weight`, the matrix that this makes."""

    weight: Tensor
    base: LowRankDelta | None = None
    keep: Tensor | None = None


def replace_weight(weight: Tensor, activations: Activations, options: Options, dtype: torch.dtype) -> Replacement | None:
    """The replacement that the options ask for, as it will be read back from `dtype`; None where rank K saves no product.

    R-LoDA: the better of the truncated SVD and the projection on the leading principal directions of the outputs, on activations held
    out. S-LoDA: the `keep` share of the entries that are largest in magnitude.
    """
    if options.keep is not None:
        keep = largest(weight, options.keep)
        return Replacement(torch.where(keep, weight, 0.0), keep=keep)
    assert options.base_rank is not None
    rows, columns = weight.shape
    if options.base_rank * (rows + columns) >= rows * columns:
        return None
    found = best_lora(DenseDelta(weight), activations, options.base_rank, options.seed)
    base = LowRankDelta(found.B.to(dtype).float(), found.A.to(dtype).float())
    return Replacement(base.dense(), base=base)


def largest(weight: Tensor, share: float) -> Tensor:
    """Where the `share` of entries lies that is largest in magnitude, at least one; of equal ones the first in the order of rows."""
    count = max(1, round(share * weight.numel()))
    order = torch.argsort(weight.abs().reshape(-1), descending=True, stable=True)
    keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[:count]] = True
    return keep.reshape(weight.shape)


def target_of(delta: Delta, weight: Tensor, replacement: Replacement) -> DenseDelta:
    """What the adapter has to add to the replacement to make it the fine-tune's weight."""
    return DenseDelta(weight - replacement.weight + delta.dense())
