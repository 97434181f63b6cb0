"""A finished LoRA in the form that the program which will serve it takes; what it computes stays the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.image_loras import in_form
from adapt_convert.convert.preflight import Plan
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.gguf_adapter import GgufAdapter
from adapt_convert.formats.image_lora import ImageLora
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.profiles import EXPERT, Profile


@dataclass(frozen=True)
class Fitted:
    """A LoRA in a consumer's form. `rank` is its largest; `padded` and `filled` are the matrices that got zeros to reach it, or
    that came along though nothing in them had changed."""

    adapter: LoraAdapter | GgufAdapter | ImageLora
    profile: Profile
    rank: int
    padded: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)

    def to_json(self, left_out: float) -> dict[str, Any]:
        """Its part of `conversion.json`."""
        return {
            "name": self.profile.name,
            "consumer": f"{self.profile.title} {self.profile.version}",
            "layout": self.profile.layout,
            "rank": self.rank,
            "padded": len(self.padded),
            "filled_with_zeros": len(self.filled),
            "left_out_energy": left_out,
            "serve": self.profile.how_to_serve(self.rank),
        }


def fit(adapter: LoraAdapter, plan: Plan, base: Checkpoint, profile: Profile) -> Fitted:
    """The adapter in the consumer's form; `B A` of every matrix stays what it was.

    One rank for all, by rows and columns of zeros; zeros for the matrices that have to come with others; the file's layout.
    """
    factors, embeddings = dict(adapter.factors), dict(adapter.embeddings)
    rank = max((delta.rank for delta in (*factors.values(), *embeddings.values())), default=0)
    padded: list[str] = []
    filled: list[str] = []
    if profile.uniform:
        for held in (factors, embeddings):
            padded += [module for module, delta in held.items() if delta.rank < rank]
            held.update({module: delta.padded(rank) for module, delta in held.items()})
    for module in absent_modules(factors, plan, profile):
        rows, columns = base.infos[plan.base_keys[f"{module}.weight"]].shape
        dtype = next(iter(factors.values())).A.dtype
        factors[module] = LowRankDelta(torch.zeros(rows, rank, dtype=dtype), torch.zeros(rank, columns, dtype=dtype))
        filled.append(module)
    fitted = replace(adapter, factors=factors, embeddings=embeddings)
    written: LoraAdapter | GgufAdapter | ImageLora = fitted
    if profile.layout == "gguf":
        written = GgufAdapter(fitted, plan.config)
    elif profile.layout != "peft":
        written = in_form(fitted, base, profile.layout)
    return Fitted(written, profile, rank, padded, filled)


def absent_modules(factors: Iterable[str], plan: Plan, profile: Profile) -> list[str]:
    """The modules of the base that the consumer wants adapted beside those that are."""
    present = set(factors)
    wanted = set(present)
    for module in present:
        wanted |= set(profile.needed_beside(module))
    if profile.experts != "any":
        stacks = {match[1] for module in present if (match := EXPERT.fullmatch(module))}
        bases = (name.removesuffix(".weight") for name in plan.base_keys)
        wanted |= {name for name in bases if (match := EXPERT.fullmatch(name)) and match[1] in stacks}
    if profile.every_layer:
        types = {_without_layer(module) for module in wanted}
        wanted |= {name.removesuffix(".weight") for name in plan.base_keys if _without_layer(name.removesuffix(".weight")) in types}
    return sorted(module for module in wanted - present if f"{module}.weight" in plan.base_keys)


def _without_layer(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", module)
