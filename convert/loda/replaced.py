"""Which weights R- and S-LoDA replace: known from the plan, for a prediction without torch."""

from __future__ import annotations

from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import Entry

_ROLES = ("q", "k", "v", "qkv")  # the paper's W_proj


def is_replaced(entry: Entry, options: Options) -> bool:
    """Whether R- or S-LoDA replaces a matrix: q, k and v, or whatever --target-modules names."""
    if options.base_rank is None and options.keep is None:
        return False
    return bool(options.target_modules) or (entry.place is not None and entry.place.role in _ROLES)
