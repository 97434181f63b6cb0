"""Which of the candidates to make, in one sentence, or that none of them is worth making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapt_convert.convert.planning.candidates import Candidate
from adapt_convert.formats.sizes import size_text

WORTH = 0.5  # share of the size of all changed tensors above which an adapter is no saving


def recommend(found: Sequence[Candidate], capture: float, full_bytes: int, is_checkpoint: bool) -> dict[str, Any]:
    """The smallest candidate that captures the share `capture` of the change of all matrices in less than half of `full_bytes`.

    `options` is None, and the sentence says what to ship instead, where there is none: then either none of the candidates captures so
    much, or those that do are too large, and the sentence says which. `full_bytes` are those of the changed tensors, stored as they
    are, or of the adapter that is to be converted.
    """
    whole = f"the {size_text(full_bytes)} of {'the changed tensors' if is_checkpoint else 'this adapter'}"
    small = [one for one in found if one.bytes < WORTH * full_bytes]
    enough = [one for one in found if one.captured_of_matrices >= capture]
    best = min(enough, key=lambda one: (one.bytes, -one.captured_of_matrices), default=None)
    if best is not None and best in small:
        return {
            "options": best.options,
            "sentence": f"Make {best.options}: {size_text(best.bytes)} hold {best.captured_of_matrices:.1%} of the change, "
            f"{best.bytes / full_bytes:.1%} of {whole}.",
        }
    nearest = max(small, key=lambda one: (one.captured_of_matrices, -one.bytes), default=None)
    most = f"the most that fits is {nearest.captured_of_matrices:.1%} ({nearest.options})" if nearest else "none fits"
    ship = "the full delta" if is_checkpoint else "it as it is"
    return {
        "options": None,
        "sentence": f"No adapter below half of {whole} holds {100 * capture:g}% of the change: {_least(best, full_bytes)}, and {most}; "
        f"ship {ship}, or measure with `adapt-convert validate` how the model behaves with less.",
    }


def _least(best: Candidate | None, full_bytes: int) -> str:
    """What holding enough would take."""
    if best is None:
        return "no candidate of any size does"
    stored = f", of them {size_text(best.bytes_exact)} stored exactly" if best.bytes_exact else ""
    return f"the smallest that does takes {size_text(best.bytes)}, {best.bytes / full_bytes:.1%}{stored} ({best.options})"
