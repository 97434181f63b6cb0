"""Which of the candidates to make, in one sentence, or that none of them is worth making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapt_convert.convert.planning.candidates import Candidate
from adapt_convert.formats.sizes import size_text

WORTH = 0.5  # share of the size of all changed tensors above which an adapter is no saving


def recommend(found: Sequence[Candidate], capture: float, full_bytes: int, is_checkpoint: bool) -> dict[str, Any]:
    """The smallest candidate that captures the share `capture` of the change of all matrices in less than half of `full_bytes`.

    `options` is None, and the sentence says what to ship instead, where there is none. `full_bytes` are those of the changed tensors,
    stored as they are.
    """
    small = [one for one in found if one.bytes < WORTH * full_bytes]
    enough = [one for one in small if one.captured_of_matrices >= capture]
    if enough:
        best = min(enough, key=lambda one: (one.bytes, -one.captured_of_matrices))
        return {
            "options": best.options,
            "sentence": f"Make {best.options}: {size_text(best.bytes)} hold {best.captured_of_matrices:.1%} of the change, "
            f"{best.bytes / full_bytes:.1%} of the {size_text(full_bytes)} of the changed tensors.",
        }
    what, whole = ("fine-tune", "the full delta") if is_checkpoint else ("adapter", "it as it is")
    nearest = max(small, key=lambda one: (one.captured_of_matrices, -one.bytes), default=None)
    most = f"the most that fits is {nearest.captured_of_matrices:.1%} ({nearest.options})" if nearest else "none fits"
    return {
        "options": None,
        "sentence": f"This {what} is not low-rank: no adapter below half of the {size_text(full_bytes)} of its changed tensors holds "
        f"{100 * capture:g}% of the change, {most}; ship {whole}, or measure with `adapt-convert validate` how it behaves with less.",
    }
