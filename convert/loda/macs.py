"""Multiply-accumulates (MACs) of one token through adapted matrices, counted from the products that a forward pass does.

For a weight `(out, in)`, an adapter of rank r, a low-rank weight of rank K and a sparse one of which a share s stays:

| what runs | MACs |
|---|---|
| the weight alone, or with a merged LoRA | `out in` |
| LoRA beside it | `out in + r (out + in)` |
| LoDA | `out in + r (out + in) + 2 r^2` |
| LoDA+ | `out in + r (2 out + in) + 2 r^2` |
| R-LoDA(+) | as above with `K (out + in)` in place of `out in` |
| S-LoDA(+) | as above with `s out in`, the entries that stay, in place of `out in` |

What acts on single elements (LeakyReLU, layer norm, f2's factors, biases) is a term of order `r + out` and is left out, as usual.
"""

from __future__ import annotations

import math

from adapt_convert.formats.loda import LodaMatrix


def adapter_macs(matrix: LodaMatrix) -> int:
    """MACs that the map f itself takes for one token; a part that is None takes none."""
    rows, columns = matrix.shape
    r = matrix.rank
    linear = r * (rows + columns)
    inner = 2 * r * r if matrix.f1 is not None else 0
    return linear + inner + (r * rows if matrix.f2 is not None else 0)


def weight_macs(matrix: LodaMatrix) -> int:
    """MACs of what stands in the place of the base's weight, or of that weight itself."""
    if matrix.base is not None:
        return matrix.base.rank * sum(matrix.shape)
    if matrix.keep is not None:
        return int(matrix.keep.sum())
    return math.prod(matrix.shape)


def lora_macs(matrix: LodaMatrix) -> int:
    """MACs of an unmerged LoRA of the same rank beside the full weight."""
    return math.prod(matrix.shape) + matrix.rank * sum(matrix.shape)
