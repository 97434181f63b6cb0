"""The LoRA target: a truncated SVD for every changed matrix, everything else stored exactly where PEFT can hold it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from adapt_convert.convert.architectures import is_embedding
from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, inner_product, residual_energy
from adapt_convert.convert.losses import holds_others, unstorable
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.pieces import Piece
from adapt_convert.convert.preflight import Entry, Plan, output_dtype
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.ranks import spend_budget, units_of
from adapt_convert.convert.report import Record, dropped, exact, unchanged
from adapt_convert.convert.svd import factorise, factorise_for_energy, fit_left
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.peft import LoraAdapter
from adapt_convert.formats.safetensors_file import LazyTensor


def solve_lora(
    pairs: Pairs, plan: Plan, options: Options, stored: dict[Entry, float], progress: Progress
) -> tuple[LoraAdapter, list[Record]]:
    """Factor every matrix of the plan and place the changed tensors of `stored` (entry -> energy of its change)."""
    return assemble(pairs, plan, stored, _solved(pairs, plan, options, progress))


def assemble(
    pairs: Pairs, plan: Plan, stored: dict[Entry, float], solved: Iterable[tuple[Entry, Piece]]
) -> tuple[LoraAdapter, list[Record]]:
    """The adapter of the plan's matrices, each with what was solved for it, and of the changed tensors of `stored`."""
    _refuse_biases_beside_embeddings(plan, stored)
    modules = [name.removesuffix(".weight") for name in plan.base_keys if name.endswith(".weight")]
    family = plan.family
    conv1d = family is not None and family.conv1d and any(entry.transposed for entry in plan.having("factor"))
    adapter = LoraAdapter(conv1d=conv1d, experts=family.experts if family else None, all_modules=modules)
    records = [_place(entry, piece, adapter) for entry, piece in solved]
    for module, delta in list(adapter.embeddings.items()):
        for alias in plan.aliases(f"{module}.weight"):  # the same factors, on every module that shares the table
            name = alias.removesuffix(".weight")
            (adapter.embeddings if is_embedding(name) else adapter.factors)[name] = delta
    left_out = {record.entry.module for record in records if record.status == "dropped"}
    records += _store(pairs, plan, stored, left_out, adapter)
    return adapter, records


def _refuse_biases_beside_embeddings(plan: Plan, stored: dict[Entry, float]) -> None:
    """PEFT's `lora_bias`, one switch for a whole adapter, is refused by its LoRA of an embedding."""
    embedding = next((entry for entry in plan.having("factor") if entry.kind == "embedding"), None)
    bias = next((e for e in stored if e.name == f"{e.module}.bias" and plan.is_factored(e.module)), None)
    if embedding and bias:
        raise AdaptError(
            f"PEFT cannot hold a LoRA of {embedding.module} beside changed biases ({bias.name}); leave the embedding out of "
            "--target-modules, where it is stored exactly, or --exclude it"
        )


def _solved(pairs: Pairs, plan: Plan, options: Options, progress: Progress) -> Iterable[tuple[Entry, Piece]]:
    """Every matrix of the plan with what `_solve` makes of it: several at a time, or one by one where pieces are kept."""
    entries = plan.having("factor")
    ranks = _ranks_for_budget(pairs, plan, options) if options.budget is not None else {}
    waiting = progress(entries, "factoring")
    if pairs.pieces is None:
        return pairs.each(waiting, lambda entry, delta: _solve(pairs, entry, delta, options, ranks.get(entry.name)))
    return ((entry, _solve_kept(pairs, entry, options, ranks.get(entry.name))) for entry in waiting)


def _solve_kept(pairs: Pairs, entry: Entry, options: Options, budgeted: int | None = None) -> Piece:
    return pairs.kept("factored", entry, lambda: _solve(pairs, entry, pairs.passing_delta(entry), options, budgeted))


def prepare(pairs: Pairs, plan: Plan, entry: Entry, options: Options) -> None:
    """Work out, and keep among the pieces, all that a conversion will ask of the base about one tensor."""
    if entry.action == "factor":
        _solve_kept(pairs, entry, options)
        return
    pairs.change_energy(entry)
    if entry.action == "store" and entry.name == f"{entry.module}.bias" and plan.is_factored(entry.module):
        pairs.difference(entry)


def _ranks_for_budget(pairs: Pairs, plan: Plan, options: Options) -> dict[str, int]:
    """A first pass over the matrices that keeps singular values alone; a matrix whose known values are all spent is redone
    with twice as many, until none is."""
    assert isinstance(options.budget, int)
    entries, units = plan.having("factor"), units_of(plan, pairs.base)
    item = torch_dtype(output_dtype(options, pairs.source)).itemsize
    average = max(1, options.budget // (item * sum(units.numbers.values())))
    known = {entry.name: min(4 * average + 8, *entry.matrix_shape) for entry in entries}
    spectra: dict[str, Tensor] = {}
    pending = entries
    while pending:
        for entry, values in pairs.each(pending, functools.partial(_spectrum, known, options.seed)):
            spectra[entry.name] = values
        ranks = spend_budget(spectra, units, item, options.budget)
        pending = [
            entry for entry in entries if ranks[entry.name] >= len(spectra[entry.name]) == known[entry.name] < min(entry.matrix_shape)
        ]
        known |= {entry.name: min(2 * known[entry.name], *entry.matrix_shape) for entry in pending}
    if not any(ranks.values()) and any(len(values) for values in spectra.values()):
        raise AdaptError(f"--budget {options.budget} bytes: the cheapest rank of any matrix needs {item * min(units.numbers.values())}")
    return ranks


def _spectrum(known: dict[str, int], seed: int, entry: Entry, delta: Delta) -> Tensor:
    """The largest singular values, `known[name]` of them; none of a matrix that did not change."""
    if delta.energy() == 0:
        return torch.zeros(0)
    return factorise(delta, known[entry.name], torch.Generator().manual_seed(seed)).values[: known[entry.name]]


def _solve(pairs: Pairs, entry: Entry, delta: Delta, options: Options, budgeted: int | None) -> Piece:
    """Factors `B (out, r)` and `A (r, in)` in the output dtype, the energy of the change and what they miss of it.

    There are no factors for a matrix that did not change, or to which the budget gives rank 0.
    """
    generator = torch.Generator().manual_seed(options.seed)
    if delta.energy() == 0 or budgeted == 0:
        return Piece({}, {"energy": delta.energy()})
    kept = isinstance(delta, LowRankDelta) and options.keeps(delta.rank)
    if isinstance(delta, LowRankDelta) and kept and delta.rank <= min(delta.shape):
        return _written(pairs, entry, delta, delta, options)  # as it is: no SVD could do better, and this one is exact
    if options.energy is not None:
        factorisation, rank = factorise_for_energy(delta, options.energy, generator)
    else:
        rank = min(delta.shape) if kept else budgeted or options.rank or 1  # more rows than that say no more
        factorisation = factorise(delta, rank, generator, exact=False)
    return _written(pairs, entry, delta, factorisation.truncate(min(rank, options.max_rank)), options)


def _written(pairs: Pairs, entry: Entry, delta: Delta, factors: LowRankDelta, options: Options) -> Piece:
    """The factors in the output dtype, and what they then miss of the change. Of a dense one, B is fitted to A as it is written."""
    dtype = torch_dtype(output_dtype(options, pairs.source))
    A = _in_dtype(factors.A, dtype, entry)
    if isinstance(delta, DenseDelta):
        fitted, product = fit_left(delta, LowRankDelta(factors.B, A.float()))
        B = _in_dtype(fitted, dtype, entry)
        inner = inner_product(product, B)
    else:
        B, inner = _in_dtype(factors.B, dtype, entry), None
    residual = residual_energy(delta, LowRankDelta(B.float(), A.float()), inner)
    figures = {"energy": delta.energy(), "residual": residual, **pairs.source.figures.get(entry.name, {})}
    return Piece({"B": B.cpu(), "A": A.cpu()}, figures)


def _in_dtype(factor: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    """A factor rounded to the output dtype. Raises `AdaptError` when it does not fit."""
    written = factor.to(dtype)
    if not torch.isfinite(written).all():
        raise AdaptError(f"{entry.name}: its factors do not fit into {dtype}; choose --dtype bfloat16 or float32")
    return written


def _place(entry: Entry, piece: Piece, adapter: LoraAdapter) -> Record:
    """Put a matrix's factors into the adapter."""
    if not piece.tensors:
        energy = piece.figures["energy"]
        return dropped(entry, energy, "the budget captures more elsewhere") if energy else unchanged(entry)
    held = adapter.embeddings if entry.kind == "embedding" else adapter.factors
    held[entry.module] = LowRankDelta(piece.tensors["B"], piece.tensors["A"])
    if len(entry.part.shape) > 2:
        adapter.kernels[entry.module] = entry.part.shape[1:]
    more = {name: value for name, value in piece.figures.items() if name not in ("energy", "residual")}
    return Record(entry, "factored", piece.figures["energy"], piece.figures["residual"], rank=held[entry.module].rank, figures=more)


def _store(pairs: Pairs, plan: Plan, stored: dict[Entry, float], left_out: set[str], adapter: LoraAdapter) -> list[Record]:
    """Biases of factored modules as `lora_B.bias`; other tensors with their whole module in `modules_to_save`."""
    records, modules = [], set()
    for entry, energy in stored.items():
        reason = unstorable(plan, entry)
        if reason:
            records.append(dropped(entry, energy, reason))
            continue
        if entry.name == f"{entry.module}.bias" and entry.module in adapter.factors:
            if adapter.experts:
                adapter.bias_values[entry.module] = lazy_value(pairs, plan, entry.name)
            else:
                adapter.biases[entry.module] = pairs.difference(entry)
            records.append(exact(entry, energy, "as lora_B.bias" if not adapter.experts else "as base_layer.bias"))
            continue
        if entry.name == f"{entry.module}.bias" and entry.module in left_out:
            records.append(dropped(entry, energy, "the budget leaves its matrix without factors"))
            continue
        modules |= {alias.rpartition(".")[0] for alias in plan.aliases(entry.name)}
        if plan.is_factored(entry.module) or (entry.module and not holds_others(plan, entry.module)):
            modules.add(entry.module)
        records.append(exact(entry, energy, entry.reason))
    outermost = {m for m in modules if not any(m.startswith(f"{other}.") for other in modules)}
    adapter.exact_modules = sorted(outermost)
    adapter.exact = _module_values(pairs, plan, outermost)
    return records


def _module_values(pairs: Pairs, plan: Plan, modules: set[str]) -> dict[str, Tensor | LazyTensor]:
    """Every parameter of the modules: the source's value, else the base's, else that of the parameter it shares."""
    values: dict[str, Tensor | LazyTensor] = {}

    def inside(name: str) -> bool:
        return any(name.startswith(f"{module}.") for module in modules)

    for name in filter(inside, {*plan.by_name, *plan.base_keys}):
        values[name] = lazy_value(pairs, plan, name)
    for alias, owner in (plan.family.tied if plan.family else {}).items():
        if alias not in values and inside(alias):
            values[alias] = lazy_value(pairs, plan, plan.full_name(owner))
    return values


def lazy_value(pairs: Pairs, plan: Plan, name: str) -> LazyTensor:
    """A parameter's value in the fine-tune, read when it is written; the base's where the source does not change it."""
    entry = plan.by_name.get(name)
    if entry is None:
        owner = plan.full_name(plan.family.tied[name]) if plan.family and name in plan.family.tied else None
        if owner and pairs.source.kind == "checkpoint" and owner in pairs.source.parts:
            return lazy_value(pairs, plan, owner)  # stored in the base, but in the fine-tune only its owner is
        key = plan.base_keys[name]
        info = pairs.base.infos[key]
        return LazyTensor(info.shape, torch_dtype(info.dtype), lambda: pairs.base.read(key))
    shape = pairs.base.infos[entry.base_key].shape if entry.base_key and not entry.rows_added else entry.part.shape
    dtype = entry.part.dtype if entry.part.kind == "replace" else "F32"
    return LazyTensor(shape, torch_dtype(dtype), lambda: pairs.value(entry))
