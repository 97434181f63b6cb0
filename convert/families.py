"""The architecture table: model families as data, one entry each, in `table/`.

Adding a family is one entry there and one tiny model in `tests/families.py`. An architecture that is not listed still converts with
`--to lora`, where every two-dimensional weight is a matrix of its own, but for those that PEFT might not take as one (preflight.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from adapt_convert.convert.family import Family
from adapt_convert.convert.table.decoders import DECODERS
from adapt_convert.convert.table.encoders import ENCODERS
from adapt_convert.convert.table.mixtures import MIXTURES
from adapt_convert.convert.table.multimodal import MULTIMODAL

FAMILIES: tuple[Family, ...] = (*DECODERS, *MIXTURES, *MULTIMODAL, *ENCODERS)
BY_MODEL_TYPE: Mapping[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
