"""The plan of a conversion, made from headers alone: what will become of every tensor of the source.

A plan says what would happen to a tensor *if it changed*; whether it did is known once it is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapt_convert.convert.architectures import (
    Place,
    aliases_of,
    family_of,
    is_embedding,
    is_head,
    is_language_model,
    is_mixture,
    module_names,
    place_of,
    vocabulary_of,
    without_prefix,
)
from adapt_convert.convert.consumers import consumer_of, restrict
from adapt_convert.convert.experts import is_expert, is_router
from adapt_convert.convert.family import ATTENTION_ROLES, FUSED, Family
from adapt_convert.convert.latte.layout import check_latte
from adapt_convert.convert.loading import why_lost
from adapt_convert.convert.notes import kept_ranks, notes_of, unmatched
from adapt_convert.convert.options import Options, matches
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.dtypes import FLOATS
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import Part, Source

TARGET_WORDS = ("all-linear", "attention", "mlp")
Action = Literal["factor", "store", "drop"]
# Constants that old checkpoints carry and current models compute for themselves.
COMPUTED = "a buffer that the model computes itself"
_EXPERTS = re.compile(r"\.(experts?|shared_expert|block_sparse_moe|router|gate)\.")
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids|token_type_ids)$")


@dataclass(frozen=True)
class Entry:
    """One tensor of the source. `base_key` is its counterpart in the base, None when the base has none.

    `module` is the module that owns the parameter. `transposed` marks a weight stored `(in, out)`. `lossy` says that a drop is
    a loss that `--strict` refuses. `tied_to` names the parameter whose weight the base shares here.
    """

    part: Part
    base_key: str | None
    module: str
    kind: Literal["matrix", "embedding", "other"]
    action: Action
    reason: str
    place: Place | None = None
    transposed: bool = False
    lossy: bool = True
    tied_to: str | None = None
    rows_added: int = 0  # rows beyond the base's: tokens or classes that the fine-tune added

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out, in)` of a matrix or embedding, `(out, in * kh * kw)` of a convolution."""
        rows, columns = self.part.shape[0], math.prod(self.part.shape[1:])
        return (columns, rows) if self.transposed and self.part.kind != "low_rank" else (rows, columns)


@dataclass(frozen=True)
class Plan:
    """Every tensor of the source, the base's tensors that the source lacks, and what a user should know beforehand."""

    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    base_keys: Mapping[str, str]  # parameter of the loaded model -> key in the base checkpoint
    family: Family | None
    config: Mapping[str, Any]  # of the model class that the adapter is for
    follows_ties: bool  # whether a changed value also changes the parameters that share it

    @functools.cached_property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def aliases(self, name: str) -> list[str]:
        """The parameters that change with `name` because they share its value and the source does not name them."""
        if not self.follows_ties:
            return []
        return [alias for alias in aliases_of(name, self.family, self.config) if alias not in self.by_name]

    def having(self, action: Action) -> list[Entry]:
        return [entry for entry in self.entries if entry.action == action]

    def is_factored(self, module: str) -> bool:
        return module in self._factored

    @functools.cached_property
    def _factored(self) -> frozenset[str]:
        return frozenset(entry.module for entry in self.having("factor"))

    def full_name(self, name: str) -> str:
        """A name of the architecture table as the loaded model has it: a bare backbone has no prefix."""
        short = without_prefix(name, self.family)
        return name if name in self.base_keys or short not in self.base_keys else short


def make_plan(base: Checkpoint, source: Source, options: Options) -> Plan:
    """Match the source's parameters to the base's tensors and decide what the target can do with each.

    Raises `AdaptError` when the two cannot belong together: other architecture, other shapes, no common matrix.
    """
    _check_same_architecture(base, source)
    if options.to == "latte":
        check_latte(base.config, base.origin, options.rank, options.segments, options.construction)
    family = family_of(base.config) or family_of(source.config)
    config = source.config if source.kind == "checkpoint" and source.config else base.config
    base_names = module_names(base.infos, base.config or source.config)
    by_short = {without_prefix(name, family): key for key, name in base_names.items()}
    planner = _Planner(base, source, options, family, config, by_short)
    entries = tuple(planner.entry(part) for part in sorted(source.parts.values(), key=lambda part: _natural(part.name)))
    of_base = source.kind == "method"  # whose every part was looked up in the base
    if not of_base and not any(entry.kind in ("matrix", "embedding") and entry.base_key for entry in entries):
        raise AdaptError(f"{source.origin} and {base.origin} have no weight matrix in common; is this the right base?")
    base_keys = _loaded_names(base_names, source, family)
    missing = tuple(sorted(set(base_keys) - set(source.parts))) if source.kind == "checkpoint" else ()
    # In PEFT an adapter of a tied embedding leaves the head alone unless it names the head too, or asks for tying.
    follows_ties = source.kind not in ("lora", "method") or bool(source.config.get("ensure_weight_tying"))
    plan = Plan(entries, missing, (), base_keys, family, config, follows_ties)
    plan = replace(plan, notes=tuple(notes_of(plan, base, options)))
    consumer = consumer_of(base, options) if options.to == "lora" else None
    plan = restrict(plan, base, consumer) if consumer else plan
    return replace(plan, notes=(*kept_ranks(plan, options), *plan.notes))


def require_factors(plan: Plan, base: Checkpoint, options: Options) -> None:
    """Raise `AdaptError` when the options leave no matrix to factor or name modules that do not exist.

    Of the modules to exclude one has to exist: the same list may serve several models, a slip in the only name would go unseen.
    """
    for name in options.target_modules:
        if name not in TARGET_WORDS and not any(matches(entry.module, name) for entry in plan.entries):
            raise AdaptError(f"--target-modules {name}: no module is called so; there are {_module_list(plan.entries)}")
    if options.exclude and len(unmatched(plan, options)) == len(options.exclude):
        raise AdaptError(f"--exclude {','.join(options.exclude)}: no module is called so; there are {_module_list(plan.entries)}")
    if not plan.having("factor"):
        raise AdaptError(_nothing_to_factor(plan.entries, plan.family, base, options))


def _module_list(entries: Iterable[Entry]) -> str:
    names = sorted({entry.module.rsplit(".", 1)[-1] for entry in entries if entry.kind in ("matrix", "embedding")})
    return ", ".join(names[:12])


def _loaded_names(base_names: Mapping[str, str], source: Source, family: Family | None) -> dict[str, str]:
    """Base tensors by their names in the model class of the source, which may have a head, and so a prefix, where the base
    has none (or the other way round)."""
    names = {without_prefix(name, family): name for name in source.parts}
    prefixed = bool(family) and any(short != name for short, name in names.items())
    loaded = {}
    for key, name in base_names.items():
        short = without_prefix(name, family)
        if short not in names and family and prefixed and not is_head(short):
            name = f"{family.prefix}.{short}"
        loaded[names.get(short, name)] = key
    return loaded


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _check_same_architecture(base: Checkpoint, source: Source) -> None:
    if source.kind != "checkpoint":
        return
    ours, theirs = base.config.get("model_type"), source.config.get("model_type")
    if ours and theirs and ours != theirs:
        raise AdaptError(f"{source.origin} is a {theirs} and {base.origin} a {ours}: a fine-tune has its base's architecture")


def _nothing_to_factor(entries: Iterable[Entry], family: Family | None, base: Checkpoint, options: Options) -> str:
    if not options.takes_any_matrix and (family is None or not family.blocks):
        model_type = base.config.get("model_type", "of no stated model_type")
        why = f"{model_type} has none that it could hold: {family.why_no_lorta}" if family else f"{model_type} is not listed"
        return f"--to {options.to} needs to know the layers of {base.origin}, and {why}; use --to lora"
    return f"no matrix is left to convert; --target-modules and --exclude choose among {_module_list(entries)}"


@dataclass(frozen=True)
class _Planner:
    """What deciding over one tensor needs to know of the two sides; `by_short` leads from backbone names to keys of the base."""

    base: Checkpoint
    source: Source
    options: Options
    family: Family | None
    config: Mapping[str, Any]
    by_short: Mapping[str, str]

    def entry(self, part: Part) -> Entry:
        module, family = part.name.rpartition(".")[0], self.family
        key, tied_to = self._counterpart(part)
        transposed = self._is_transposed(module) and key is not None and part.name.endswith(".weight")
        kind = _kind(part, module, transposed, self.base.is_diffusion)
        rows = part.shape[:1]
        if key is not None:
            shape = self.base.infos[key].shape
            self._check_shape(part, shape[::-1] if transposed and part.kind == "low_rank" else shape, module)
            rows = shape[:1] if part.kind == "replace" else rows
        place = place_of(module, family) if family and kind == "matrix" else None
        action, reason, lossy = self._decide(part, module, kind, key, place)
        if tied_to and action != "drop" and self.source.config.get("tie_word_embeddings", True):
            action, reason = "store", f"shares {tied_to}"
        added = max(0, part.shape[0] - rows[0]) if rows else 0
        if added and action == "factor":  # the added rows have no base that factors could be added to
            action, reason = "store", f"has {added} rows more than the base"
        return Entry(part, key, module, kind, action, reason, place, transposed, lossy, tied_to, added)

    def _is_transposed(self, module: str) -> bool:
        """Whether the base stores the matrix of a module `(in, out)`."""
        family = self.family
        if family is None:
            return False
        if family.conv1d:
            return place_of(module, family) is not None
        return bool(family.experts and family.experts.transposed and is_expert(module, family) and not module.endswith("_bias"))

    def _counterpart(self, part: Part) -> tuple[str | None, str | None]:
        """The base's tensor for a parameter; and the parameter it shares, where the base does not store it on its own."""
        key = self.by_short.get(without_prefix(part.name, self.family))
        owner = self.family.tied.get(part.name) if self.family and key is None else None
        if owner and without_prefix(owner, self.family) in self.by_short:
            return self.by_short[without_prefix(owner, self.family)], owner
        if key is None and part.kind != "replace":
            raise AdaptError(f"{self.source.origin}: adapts {part.name}, which {self.base.origin} does not have; is this the right base?")
        return key, None

    def _check_shape(self, part: Part, shape: tuple[int, ...], module: str) -> None:
        if part.shape == shape:
            return
        # Rows may be added or cut where rows are tokens or classes: an embedding table or a head, outside the numbered layers.
        in_layers = re.search(r"\.\d+\.", f".{module}.") is not None
        if part.shape[1:] == shape[1:] and len(shape) in (1, 2) and not in_layers and part.kind == "replace":
            return
        raise AdaptError(
            f"{part.name} is {list(part.shape)} in {self.source.origin} but {list(shape)} in {self.base.origin}: "
            "not a fine-tune of this base"
        )

    def _decide(self, part: Part, module: str, kind: str, key: str | None, place: Place | None) -> tuple[Action, str, bool]:
        """What to do with a tensor if it changed: the action, its reason, and whether dropping it counts as a loss."""
        if any(matches(module, pattern) for pattern in self.options.exclude):
            return "drop", "excluded by --exclude", False
        if part.dtype not in FLOATS or _BUFFER.search(part.name):
            computed = _BUFFER.search(part.name) is not None
            return "drop", COMPUTED if computed else "holds no floating-point numbers", not computed
        if is_mixture(self.config) and _EXPERTS.search(f".{module}."):
            if self.family is None or self.family.experts is None:
                return "drop", "part of a mixture of experts, in a form that is not known for this architecture", True
            if is_router(module, self.family):
                return "store", "chooses among experts", True
            if self.options.to != "lora":
                return "drop", "part of a mixture of experts, which no LoRTA or LatTE holds", True
        if self.family is None and self.source.kind == "checkpoint":
            lost = why_lost(part.keys[0], part.name, kind == "matrix", self.config)
            if lost:
                return "drop", lost, True
        if kind == "embedding" and self.family is None and self._shares_unknown_head(part):
            return "drop", "shared with an output head whose name is not known for this architecture", True
        if kind == "matrix" and self.family is None and self._may_be_a_table(part, module):
            return "store", "has a row for every token, and may be a table", True
        if key is None:
            return "store", "new in the fine-tune", True
        if self.options.to == "lora" and self.family and any(module.endswith(f".{name}") for name in self.family.whole):
            return "store", "PEFT takes no LoRA of it", True
        saved_whole = self.source.kind != "checkpoint" and part.kind == "replace" and part.rank is None
        if saved_whole and self.options.takes_any_matrix and not self.options.target_modules:
            return "store", "stored whole in the source", True  # `modules_to_save`: its author found a LoRA too little for it
        if self._is_targeted(module, kind, place):
            if kind == "matrix" and not self.options.takes_any_matrix and place is None:
                return "drop", "not one of the attention or MLP matrices that a LoRTA or LatTE holds", True
            if kind == "matrix" or self.options.to == "lora":
                return "factor", "", True
        if kind == "embedding" and part.kind != "replace" and self.options.to == "lora":
            return "factor", "", True
        if kind == "matrix" and (place is not None or self.options.takes_any_matrix):
            return "drop", _untargeted_reason(self.options), True
        return "store", "", True

    def _may_be_a_table(self, part: Part, module: str) -> bool:
        """Whether a weight of an unlisted architecture could be an embedding under a name that is not known: PEFT ignores factors of
        a matrix for one in silence, and takes it whole in either case."""
        return (
            part.kind == "replace"
            and part.shape[0] == vocabulary_of(self.config)
            and not is_head(module)
            and not self.options.target_modules
        )

    def _shares_unknown_head(self, part: Part) -> bool:
        """Whether storing this embedding alone would leave a tied head of an unlisted architecture behind, in silence."""
        config = self.config
        if not is_language_model(config) or part.shape[0] != vocabulary_of(config) or not config.get("tie_word_embeddings", True):
            return False
        return not any(other.shape == part.shape and other.name != part.name for other in self.source.parts.values())

    def _is_targeted(self, module: str, kind: str, place: Place | None) -> bool:
        any_matrix = self.options.takes_any_matrix
        names = self.options.target_modules or (("attention",) if self.options.to == "lorta" else ("all-linear",))
        attention = place is not None and set(FUSED.get(place.role, (place.role,))) <= set(ATTENTION_ROLES)
        return kind in ("matrix", "embedding") and any(
            (name == "all-linear" and kind == "matrix" and (any_matrix or place is not None))
            or (name == "attention" and attention)
            or (name == "mlp" and place is not None and not attention)
            or matches(module, name)
            for name in names
        )


def _kind(part: Part, module: str, transposed: bool, convolutions: bool) -> Literal["matrix", "embedding", "other"]:
    """Convolutions count as matrices in diffusion models, and where an adapter has factors of one."""
    floating = part.dtype in FLOATS
    is_matrix = len(part.shape) == 2 or (len(part.shape) in (3, 4, 5) and (convolutions or part.kind != "replace"))
    if not is_matrix or not floating or not part.name.endswith(".weight") or min(part.shape) == 0:
        return "other"
    return "embedding" if is_embedding(module) and len(part.shape) == 2 and not transposed else "matrix"


def _untargeted_reason(options: Options) -> str:
    if options.target_modules:
        return "not in --target-modules"
    return "outside the attention that a LoRTA holds by default; --target-modules all-linear adds the MLP"


def output_dtype(options: Options, source: Source) -> str:
    """The dtype of an adapter: the one asked for, or that of most of the source's numbers, which its author thought enough."""
    if options.dtype is not None:
        return options.dtype
    counts: dict[str, int] = {}
    for name, info in source.store.infos.items():
        if info.is_float and name not in source.ignored:
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    best = max(counts, key=lambda name: counts[name], default="F32")
    return {"F16": "float16", "BF16": "bfloat16"}.get(best, "float32")
