"""R-LoDA and S-LoDA: a cheaper weight in the place of the base's, whose error the adapter absorbs as far as its rank goes."""

from __future__ import annotations

import torch
from torch import Tensor

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta
from adapt_convert.convert.loda.fit import Activations, best_lora
from adapt_convert.convert.options import Options


def replace_weight(
    weight: Tensor, activations: Activations, options: Options, dtype: torch.dtype
) -> tuple[LowRankDelta | None, Tensor | None]:
    """What stands in for `weight (out, in)` as it will be read back from `dtype`: a low-rank weight, or the entries to keep. Neither
    where rank K saves no product.

    R-LoDA: the better of the truncated SVD and the projection on the leading principal directions of the outputs, on activations held
    out. S-LoDA: the `keep` share of the entries that are largest in magnitude.
    """
    if options.keep is not None:
        return None, largest(weight, options.keep)
    assert options.base_rank is not None
    rows, columns = weight.shape
    if options.base_rank * (rows + columns) >= rows * columns:
        return None, None
    found = best_lora(DenseDelta(weight), activations, options.base_rank, options.seed)
    return found.cast(dtype).cast(torch.float32), None


def largest(weight: Tensor, share: float) -> Tensor:
    """Where the `share` of entries lies that is largest in magnitude, at least one; of equal ones the first in the order of rows."""
    count = max(1, round(share * weight.numel()))
    order = torch.argsort(weight.abs().reshape(-1), descending=True, stable=True)
    keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[:count]] = True
    return keep.reshape(weight.shape)


def target_of(delta: Delta, weight: Tensor, base: LowRankDelta | None, keep: Tensor | None) -> Delta:
    """What the map has to add to the weight that runs to make it the fine-tune's: the change itself where nothing is replaced."""
    if base is None and keep is None:
        return delta
    runs = base.to(weight.device).dense() if base is not None else torch.where(keep.to(weight.device), weight, 0.0)  # type: ignore[union-attr]
    return DenseDelta(weight - runs + delta.dense())
