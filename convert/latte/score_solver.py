"""LatTE by the score construction: the low-rank changes of q, k and v, for models without rotary embeddings.

Only these are held; the blocks of Theorem 2 follow from them and the base when a model is loaded (kernels/latte_score.py). Norms and
biases are stored exactly, other matrices are out of this construction's reach.
"""

from __future__ import annotations

from typing import Any

import torch

from adapt_convert.convert.architectures import heads_of
from adapt_convert.convert.delta import Delta, residual_energy
from adapt_convert.convert.latte.layout import ScoreLayout, score_layout_of
from adapt_convert.convert.latte.score import check_heads, paper_padding, widened
from adapt_convert.convert.lora import lazy_value
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record, dropped, exact, unchanged
from adapt_convert.convert.svd import factorise, factorise_for_energy
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, LatteTask, fingerprint

OUT_OF_REACH = "the score construction holds q, k and v of the attention; --construction residual holds every matrix"


def solve_scores(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[LatteAdapter, list[Record]]:
    """Factor the changes of q, k and v, one after the other, and keep the changed tensors of `stored` by value."""
    layout = score_layout_of(pairs.base.config, pairs.base.origin)
    check_heads(options.heads, options.rank or 0)
    dtype = torch_dtype(output_dtype(options, pairs.source))
    task = LatteTask(pairs.source.location.name)
    adapter = LatteAdapter(str(pairs.base.config.get("model_type")), [], [task], construction="score")
    records = []
    for entry in progress(plan.having("factor"), "factoring"):
        delta, owner = pairs.passing_delta(entry), _owner(entry.module, layout)
        if delta.energy() == 0:
            records.append(unchanged(entry))
        elif owner is None:
            records.append(dropped(entry, delta.energy(), OUT_OF_REACH))
        else:
            records.append(_factor(entry, delta, owner, layout, task, options, dtype))
    if not task.scores:
        raise AdaptError(f"{pairs.source.origin}: neither q, k nor v changed; there is nothing to expand")
    records += [exact(entry, energy, entry.reason) for entry, energy in stored.items()]
    task.exact = {entry.name: lazy_value(pairs, plan, entry.name) for entry in stored}
    for module in sorted(name.removesuffix(".weight") for name in plan.base_keys if name.endswith(".weight")):
        if _owner(module, layout) is not None:
            weight = pairs.base.read(plan.base_keys[f"{module}.weight"])
            adapter.fingerprints[module] = fingerprint(weight, weight.dtype)
    adapter.details = {"parameters": adapter.parameters(), "head_dims": _head_dims(pairs, records)}
    return adapter, records


def _head_dims(pairs: Pairs, records: list[Record]) -> dict[str, Any]:
    """What every head gains, exactly, next to the paper's padding, which counts the rank once for all heads and cannot be exact."""
    heads = heads_of(pairs.base.config)
    rank = max((record.rank or 0 for record in records), default=0)
    if heads is None:
        return {"added_to_every_head": widened(rank)}
    return {
        "added_to_every_head": widened(rank),
        "paper_wider": paper_padding(rank, heads.query, heads.size, "wider"),
        "paper_more_heads": paper_padding(rank, heads.query, heads.size, "more"),
    }


def _owner(module: str, layout: ScoreLayout) -> str | None:
    """The attention that a matrix of q, k or v belongs to."""
    for name in layout.inputs:
        if module.endswith(f".{name}") and ".crossattention." not in module:
            return module.removesuffix(name) + layout.owner
    return None


def _factor(entry: Entry, delta: Delta, owner: str, layout: ScoreLayout, task: LatteTask, options: Options, dtype: torch.dtype) -> Record:
    """One matrix, or the three parts of a fused one, each by its own truncated SVD."""
    fused = len(layout.inputs) == 1
    letters = "qkv" if fused else "qkv"[next(i for i, name in enumerate(layout.inputs) if entry.module.endswith(name))]
    rows = delta.shape[0] // len(letters)
    energy, residual, largest = delta.energy(), 0.0, 0
    for number, letter in enumerate(letters):
        part = delta.rows(number * rows, (number + 1) * rows)
        if part.energy() == 0:
            continue
        generator = torch.Generator().manual_seed(options.seed)
        if options.energy is not None:
            factorisation, rank = factorise_for_energy(part, options.energy, generator)
        else:
            assert options.rank is not None
            factorisation, rank = factorise(part, options.rank, generator), options.rank
        written = factorisation.truncate(rank).cast(dtype)
        task.scores[f"{owner}.{letter}_A"], task.scores[f"{owner}.{letter}_B"] = written.A.cpu().contiguous(), written.B.cpu().contiguous()
        residual += residual_energy(part, written.cast(torch.float32))
        largest = max(largest, written.rank)
    return Record(entry, "factored", energy, residual, rank=largest)
