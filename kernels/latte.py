"""LatTE on a live `transformers` model: expand it by swapping modules, and take it all off again.

The decoder layers stay as they are; what they call is swapped (kernels/latte_modules.py). The expanded weights hold the base's in
their first block and replace them in memory, so that a loaded LatTE costs its extra blocks and no second copy of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.latte.layout import Layout, layout_of, score_layout_of
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, Segment, matches_fingerprint, read_latte
from adapt_convert.formats.location import Location
from adapt_convert.kernels.expanded_weights import (
    bias_table,
    check_block,
    give_back_weight,
    post_norm_weight,
    reader_weight,
    writer_weight,
)
from adapt_convert.kernels.latte_modules import (
    ExpandedLinear,
    ExpandedNorm,
    NormOfResidual,
    PostNormEntry,
    SegmentEntry,
    SegmentExit,
    TaskNorm,
)
from adapt_convert.kernels.latte_score import load_scores
from adapt_convert.kernels.surgery import Replaced, weight_of
from adapt_convert.kernels.tasks import Tasks


@dataclass
class LatteState(Replaced):
    """What taking a LatTE off needs.

    `transposed` says of expanded matrices whether the base stores them `(in, out)`; `edges` are the hooks at the starts of
    segments; `attributes` are fields of attention modules with their former values.
    """

    transposed: dict[str, bool] = field(default_factory=dict)
    edges: dict[str, Any] = field(default_factory=dict)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)

    def restore(self, model: nn.Module) -> nn.Module:
        self.refuse_cast(model)
        for name, handle in self.edges.items():
            handle.remove()
            delattr(model.get_submodule(name), "latte_edge")
        for owner, attribute, size in self.attributes:
            setattr(owner, attribute, size)
        return super().restore(model)

    def put_back(self, model: nn.Module, name: str, module: nn.Module) -> None:
        expanded = model.get_submodule(name)
        super().put_back(model, name, module)
        if name in self.transposed:  # one at a time: two copies of the whole model may not fit
            give_back_weight(module, expanded, self.transposed[name])


def load_latte(model: nn.Module, location: Location) -> nn.Module:
    """Expand `model`, the base, by the LatTE directory at `location`; the model is unchanged if that raises `AdaptError`.

    Inference only: dropout of a training model would act on the carried parts separately. Hidden states that the model records
    between its layers (`output_hidden_states`) are the carried ones, `[h; w; t ..]`; the last one is not.
    """
    adapter = read_latte(location)
    config = getattr(model, "config", None)
    if config is None or adapter.model_type != config.model_type:
        own = "not a transformers model" if config is None else config.model_type
        raise AdaptError(f"{location.origin}: is made for {adapter.model_type}, the model is {own}")
    find = score_layout_of if adapter.construction == "score" else layout_of
    layout = find(config.to_dict(), type(model).__name__)
    names = Names(model, layout.layers, adapter)
    _check(model, adapter, names, location.origin)
    state = LatteState(tasks=Tasks(len(adapter.tasks)))

    def put_on() -> None:
        if isinstance(layout, Layout):
            _Loader(model, adapter, layout, names, state, location.origin).run()
        else:
            load_scores(model, adapter, layout, names, state, location.origin)

    return state.fill(model, put_on)


class Names:
    """Names of matrices in the adapter and in the live model: a bare backbone, as base of either, lacks the prefix of the layout's."""

    def __init__(self, model: nn.Module, layers: str, adapter: LatteAdapter) -> None:
        self._prefix = layers.split(".")[0] + "."
        self._bare_model = not _has(model, layers)
        self._bare_adapter = any(not name.startswith(self._prefix) for name in adapter.fingerprints)
        if self._bare_model and not _has(model, layers.removeprefix(self._prefix)):
            raise AdaptError(f"this {type(model).__name__} has no {layers}")
        blocks = model.get_submodule(layers.removeprefix(self._prefix) if self._bare_model else layers)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks

    def live(self, name: str) -> str:
        """A name of the layout or the adapter as the model has it."""
        if self._bare_model:
            return name.removeprefix(self._prefix)
        return self._prefix + name if self._bare_adapter and not name.startswith(self._prefix) else name

    def held(self, name: str) -> str:
        """A name of the layout as the adapter has it."""
        return name.removeprefix(self._prefix) if self._bare_adapter else name


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check(model: nn.Module, adapter: LatteAdapter, names: Names, origin: str) -> None:
    """Whether the adapter was made for this base: its depth, and a fingerprint of every expanded matrix."""
    if adapter.segments and adapter.segments[-1].stop != len(names.blocks):
        raise AdaptError(f"{origin}: covers {adapter.segments[-1].stop} layers, the model has {len(names.blocks)}: made for another base")
    for module, hashes in adapter.fingerprints.items():
        weight = weight_of(model, names.live(module))
        if not matches_fingerprint(weight, hashes):
            raise AdaptError(f"{origin}: made for another base: {module}.weight has other values here; load it onto {adapter.base_model}")


class _Loader:
    """The swaps of one load. `left` are the tensors of the adapter that have found no place yet, by group, task and name."""

    def __init__(self, model: nn.Module, adapter: LatteAdapter, layout: Layout, names: Names, state: LatteState, origin: str) -> None:
        self.model, self.adapter, self.layout, self.names, self.state, self.origin = model, adapter, layout, names, state, origin
        assert state.tasks is not None
        self.tasks = state.tasks
        expanded = ("reader", "writer", "bias")
        self.left = {(group, number, name) for group in expanded for number, t in enumerate(adapter.tasks, 1) for name in t.groups[group]}

    def run(self) -> None:
        self._set_exact()
        segments = self.adapter.segments
        for number, segment in enumerate(segments):
            before = segments[number - 1] if number else None
            after = segments[number + 1] if number + 1 < len(segments) else None
            self._open(segment, before)
            for layer in segment.layers:
                self._expand_layer(self.layout.block.format(layer), segment)
                self._cross_post_norms(self.layout.block.format(layer), segment, segment if layer + 1 < segment.stop else after)
        if self.layout.final_norm:
            self._cross(self.layout.final_norm, segments[-1], None)
        for group, number, name in sorted(self.left):
            raise AdaptError(f"{self.origin}: {number}.{group}.{name} is of no matrix that a LatTE of {self.adapter.model_type} expands")

    def _set_exact(self) -> None:
        """Parameters held by value: those of norms by task and row, others for every row, which one adapter alone can ask for."""
        tasks, contained = self.adapter.tasks, self._contained()
        for module in sorted({name.rpartition(".")[0] for task in tasks for name in task.exact}):
            live = self.names.live(module)
            if live in contained:
                raise AdaptError(f"{self.origin}: holds {module} by value, which its matrices contain: the file was changed")
            norm = self.model.get_submodule(live) if _has(self.model, live) else None
            weight = getattr(norm, "weight", None)
            if norm is not None and isinstance(weight, Tensor) and weight.ndim == 1:
                tables = [self._task_table(norm, module, attribute) for attribute in ("weight", "bias")]
                self._set_values(module)
                assert tables[0] is not None
                self._swap(live, TaskNorm(norm, tables[0], tables[1], self.layout.norm, self.tasks))
            elif len(tasks) > 1:
                raise AdaptError(f"{self.origin}: a bundle cannot hold {module}, which is no norm, task by task")
            else:
                self.state.for_all_rows += self._set_values(module)

    def _contained(self) -> set[str]:
        """The modules whose values the blocks contain: the matrices, and the norms in front of readers."""
        layout, layers = self.layout, range(len(self.names.blocks))
        inside = [*filter(None, layout.readers), *(r for readers in layout.readers.values() for r in readers), *layout.writers]
        return {self.names.live(f"{layout.block.format(layer)}.{name}") for layer in layers for name in inside}

    def _set_values(self, module: str) -> list[str]:
        """Without task ids a single adapter's values hold for all rows; a bundle is the base then, and nothing is set."""
        held = self.adapter.tasks[0].exact if len(self.adapter.tasks) == 1 else {}
        names = [name for name in held if name.rpartition(".")[0] == module]
        for name in names:
            value = held[name]
            assert isinstance(value, Tensor)
            self.state.set_parameter(self.model, self.names.live(name), value)
        return names

    def _task_table(self, norm: nn.Module, module: str, attribute: str) -> Tensor | None:
        """A norm's gain or bias of the base and of every task, `(T + 1, d)`."""
        value = getattr(norm, attribute, None)
        if value is None:
            return None
        rows = [value, *(task.exact.get(f"{module}.{attribute}", value) for task in self.adapter.tasks)]
        if any(row.shape != value.shape for row in rows):
            raise AdaptError(f"{self.origin}: {module}.{attribute} has another shape than the model's {list(value.shape)}")
        return torch.stack([row.to(value.device, value.dtype) for row in rows]).detach()

    def _open(self, segment: Segment, before: Segment | None) -> None:
        """At the start of a segment: enter its basis, after leaving the one before; behind a post-norm that has been done."""
        if before is not None and self.layout.post_norms:
            return
        name = self.names.live(self.layout.block.format(segment.start))
        layer = self.model.get_submodule(name)
        like = _parameter(layer)
        enter = self._enter(segment, like)
        layer.latte_edge = enter if before is None else nn.Sequential(self._leave(before, like), enter)
        self.state.edges[name] = layer.register_forward_pre_hook(_through_edge, with_kwargs=True)

    def _enter(self, segment: Segment, like: Tensor) -> nn.Module:
        entry = PostNormEntry if self.layout.post_norms else SegmentEntry
        return entry(segment.Q.to(like.device, like.dtype), self.tasks)

    def _leave(self, segment: Segment, like: Tensor) -> SegmentExit:
        Q = segment.Q.to(like.device, like.dtype)
        parts = 2 * self.tasks.count if self.layout.post_norms else 1 + self.tasks.count
        return SegmentExit(Q, len(Q) + parts * segment.rank, self.tasks)

    def _expand_layer(self, path: str, segment: Segment) -> None:
        for norm_name, readers in self.layout.readers.items():
            norm = self.model.get_submodule(self.names.live(f"{path}.{norm_name}")) if norm_name else None
            gain = None if norm is None else _parameter(norm).float() + (1.0 if self.layout.norm == "gemma" else 0.0)
            for reader in readers:
                self._expand(f"{path}.{reader}", segment, True, gain)
            if norm is not None:
                self._swap(self.names.live(f"{path}.{norm_name}"), ExpandedNorm(norm, segment.rank, self.layout.norm, self.tasks))
        for writer in self.layout.writers:
            self._expand(f"{path}.{writer}", segment, False, None)

    def _cross_post_norms(self, path: str, segment: Segment, behind: Segment | None) -> None:
        """In a post-norm layer: `behind` is the segment of the next layer, None after the last."""
        for norm_name in self.layout.post_norms:
            self._cross(f"{path}.{norm_name}", segment, behind if norm_name == self.layout.post_norms[-1] else segment)

    def _cross(self, norm_name: str, leaving: Segment, entering: Segment | None) -> None:
        name = self.names.live(norm_name)
        norm = self.model.get_submodule(name)
        like = _parameter(norm)
        enter = None if entering is None else self._enter(entering, like)
        self._swap(name, NormOfResidual(norm, self._leave(leaving, like), enter))

    def _expand(self, path: str, segment: Segment, reads: bool, gain: Tensor | None) -> None:
        """Expand one matrix, by its name in the layout: a reader behind a norm of this `gain` or behind none, or a writer."""
        name, adapted = self.names.live(path), self.names.held(path)
        if adapted not in self.adapter.fingerprints:
            raise AdaptError(f"{self.origin}: has no fingerprint of {adapted}: the file was changed")
        module, stored = self.model.get_submodule(name), weight_of(self.model, name)
        weight = stored.data.T if self.layout.conv1d else stored.data
        Q = segment.Q.to(weight.device)
        blocks = self._take("reader" if reads else "writer", adapted)
        biases = self._take("bias", adapted)
        sizes = (weight.shape[0], segment.rank) if reads else (segment.rank, weight.shape[1])
        for tensor, expected in (*((block, sizes) for block in blocks), *((bias, weight.shape[:1]) for bias in biases)):
            check_block(tensor, tuple(expected), f"{self.origin}: {adapted}")
        if len(Q) != weight.shape[1 if reads else 0]:
            raise AdaptError(f"{self.origin}: its residual stream is {len(Q)} wide, that of {adapted} {weight.shape[1 if reads else 0]}")
        if self.layout.post_norms:
            expanded = post_norm_weight(weight, segment.rank, blocks, reads)
        elif reads:
            assert gain is not None
            expanded = reader_weight(weight, Q, blocks, gain)
        else:
            expanded = writer_weight(weight, Q, blocks)
        carried = None if reads or self.layout.post_norms else Q
        table = bias_table(getattr(module, "bias", None), biases, weight, carried, len(expanded))
        self._swap(name, ExpandedLinear(expanded, table, self.tasks))
        self.state.transposed[name] = self.layout.conv1d
        stored.data = stored.data.new_empty(0)

    def _take(self, group: str, name: str) -> list[Tensor | None]:
        """What each task holds for a matrix."""
        found: list[Tensor | None] = []
        for number, task in enumerate(self.adapter.tasks, 1):
            self.left.discard((group, number, name))
            found.append(task.groups[group].get(name))
        return found

    def _swap(self, name: str, module: nn.Module) -> None:
        self.state.swap(self.model, name, module)


def _through_edge(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    edge: Any = layer.latte_edge
    if args:
        return (edge(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edge(kwargs["hidden_states"])}


def _parameter(module: nn.Module) -> Tensor:
    """A parameter of the module that tells its device and dtype; of a norm, its gain."""
    weight = getattr(module, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else next(p for p in module.parameters() if p.is_floating_point()).detach()
