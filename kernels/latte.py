"""LatTE on a live `transformers` model: expand it by swapping modules, choose tasks row by row, and take it all off again.

The decoder layers stay as they are; what they call is swapped (kernels/latte_modules.py). The expanded weights hold the base's in
their first block and replace them in memory, so that a loaded LatTE costs its extra blocks and no second copy of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.latte_layout import Layout, layout_of, score_layout_of
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter, Segment, matches_fingerprint, read_latte
from adapt_convert.formats.location import Location
from adapt_convert.kernels.expanded_weights import bias_table, check_blocks, give_back_weight, reader_weight, writer_weight
from adapt_convert.kernels.latte_modules import ExpandedLinear, ExpandedNorm, NormOfResidual, SegmentEntry, SegmentExit, TaskNorm
from adapt_convert.kernels.latte_score import load_scores
from adapt_convert.kernels.surgery import STATE, Replaced, weight_of
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
        for name, handle in self.edges.items():
            handle.remove()
            delattr(model.get_submodule(name), "latte_edge")
        for owner, attribute, size in self.attributes:
            setattr(owner, attribute, size)
        for name, transposed in self.transposed.items():
            give_back_weight(self.modules[name], model.get_submodule(name), transposed)
        return super().restore(model)


def load_latte(model: nn.Module, location: Location) -> nn.Module:
    """Expand `model`, the base, by the LatTE directory at `location`; the model is unchanged if that raises `AdaptError`.

    Inference only: dropout of a training model would act on the carried parts separately. Hidden states that the model records
    between its layers (`output_hidden_states`) are the carried ones, `[h; w; s ..]`; the last one is not.
    """
    adapter = read_latte(location)
    config = getattr(model, "config", None)
    find = score_layout_of if adapter.construction == "score" else layout_of
    layout = find(config.to_dict() if config is not None else {}, type(model).__name__)
    names = _Names(model, layout.block.removesuffix(".{}"))
    _check(model, adapter, names, location.origin)
    state, tasks = LatteState(), Tasks(len(adapter.tasks))
    state.tasks = tasks
    setattr(model, STATE, state)
    try:
        with torch.no_grad():
            if isinstance(layout, Layout):
                _Loader(model, adapter, layout, names, state, tasks, location.origin).run()
            else:
                load_scores(model, adapter, layout, names.of, state)
    except BaseException:
        state.restore(model)
        raise
    return model


class _Names:
    """Names of the adapter in the live model, of which a bare backbone lacks the prefix; `blocks` is its list of layers."""

    def __init__(self, model: nn.Module, layers: str) -> None:
        self.prefix = "" if _has(model, layers) else layers.split(".")[0] + "."
        if not _has(model, self.of(layers)):
            raise AdaptError(f"this {type(model).__name__} has no {layers}")
        blocks = model.get_submodule(self.of(layers))
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks

    def of(self, name: str) -> str:
        return name.removeprefix(self.prefix) if self.prefix else name


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check(model: nn.Module, adapter: LatteAdapter, names: _Names, origin: str) -> None:
    """Whether the adapter was made for this base: architecture, shapes, and a fingerprint of every expanded matrix."""
    own = str(getattr(getattr(model, "config", None), "model_type", None))
    if adapter.model_type != own:
        raise AdaptError(f"{origin}: is made for {adapter.model_type}, the model is {own}")
    if adapter.segments and adapter.segments[-1].stop != len(names.blocks):
        raise AdaptError(f"{origin}: covers {adapter.segments[-1].stop} layers, the model has {len(names.blocks)}: made for another base")
    for module, hashes in adapter.fingerprints.items():
        weight = weight_of(model, names.of(module))
        if not matches_fingerprint(weight, hashes):
            raise AdaptError(f"{origin}: made for another base: {module}.weight has other values here; load it onto {adapter.base_model}")


class _Loader:
    """The swaps of one load, in the order in which they can be undone."""

    def __init__(
        self, model: nn.Module, adapter: LatteAdapter, layout: Layout, names: _Names, state: LatteState, tasks: Tasks, origin: str
    ) -> None:
        self.model, self.adapter, self.layout, self.names = model, adapter, layout, names
        self.state, self.tasks, self.origin = state, tasks, origin

    def run(self) -> None:
        self._set_exact()
        segments = self.adapter.segments
        for number, segment in enumerate(segments):
            before = segments[number - 1] if number else None
            after = segments[number + 1] if number + 1 < len(segments) else None
            self._open(segment, before)
            for layer in range(segment.start, segment.stop):
                self._expand_layer(self.layout.block.format(layer), segment)
                self._cross_post_norms(self.layout.block.format(layer), segment, segment if layer + 1 < segment.stop else after)
        if self.layout.final_norm:
            self._cross(self.layout.final_norm, segments[-1], None)

    def _set_exact(self) -> None:
        """Parameters held by value: those of norms by task and row, others for every row, which one adapter alone can ask for."""
        tasks = self.adapter.tasks
        for module in sorted({name.rpartition(".")[0] for task in tasks for name in task.exact}):
            norm = self.model.get_submodule(self.names.of(module))
            weight = getattr(norm, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                tables = [self._task_table(norm, module, attribute) for attribute in ("weight", "bias")]
                self._set_values(module)
                assert tables[0] is not None
                self._swap(module, TaskNorm(norm, tables[0], tables[1], self.layout.norm, self.tasks))
            elif len(tasks) > 1:
                raise AdaptError(f"{self.origin}: a bundle cannot hold {module}, which is no norm, task by task")
            else:
                self.state.for_all_rows += self._set_values(module)

    def _set_values(self, module: str) -> list[str]:
        """Without task ids a single adapter's values hold for all rows; a bundle is the base then, and nothing is set."""
        held = self.adapter.tasks[0].exact if len(self.adapter.tasks) == 1 else {}
        names = [name for name in held if name.rpartition(".")[0] == module]
        for name in names:
            value = held[name]
            assert isinstance(value, Tensor)
            self.state.set_parameter(self.model, self.names.of(name), value)
        return names

    def _task_table(self, norm: nn.Module, module: str, attribute: str) -> Tensor | None:
        """A norm's gain or bias of the base and of every task, `(T + 1, d)`."""
        value = getattr(norm, attribute, None)
        if value is None:
            return None
        rows = [value, *(task.exact.get(f"{module}.{attribute}", value) for task in self.adapter.tasks)]
        return torch.stack([row.to(value.device, value.dtype) for row in rows]).detach()

    def _open(self, segment: Segment, before: Segment | None) -> None:
        """At the start of a segment: enter its basis, after leaving the one before; behind a post-norm that has been done."""
        if before is not None and self.layout.post_norms:
            return
        name = self.names.of(self.layout.block.format(segment.start))
        layer = self.model.get_submodule(name)
        like = _parameter(layer)
        self.tasks.expand(segment.Q, like.device)
        steps = [self._enter(segment, like)] if before is None else [self._leave(before, like), self._enter(segment, like)]
        layer.latte_edge = nn.Sequential(*steps)
        self.state.edges[name] = layer.register_forward_pre_hook(_through_edge, with_kwargs=True)

    def _leave(self, segment: Segment, like: Tensor) -> SegmentExit:
        return SegmentExit(segment.Q.to(like.device, like.dtype), self.tasks)

    def _enter(self, segment: Segment, like: Tensor) -> SegmentEntry:
        return SegmentEntry(segment.Q.to(like.device, like.dtype), self.tasks)

    def _expand_layer(self, path: str, segment: Segment) -> None:
        for norm_name, readers in self.layout.readers.items():
            norm = self.model.get_submodule(self.names.of(f"{path}.{norm_name}")) if norm_name else None
            gain = None if norm is None else _parameter(norm).float() + (1.0 if self.layout.norm == "gemma" else 0.0)
            for reader in readers:
                self._expand(f"{path}.{reader}", segment, True, gain)
            if norm is not None:
                self._swap(f"{path}.{norm_name}", ExpandedNorm(norm, segment.Q, self.layout.norm, self.tasks))
        for writer in self.layout.writers:
            self._expand(f"{path}.{writer}", segment, False, None)

    def _cross_post_norms(self, path: str, segment: Segment, behind: Segment | None) -> None:
        """In a post-norm layer: `behind` is the segment of the next layer, None after the last."""
        for norm_name in self.layout.post_norms:
            self._cross(f"{path}.{norm_name}", segment, behind if norm_name == self.layout.post_norms[-1] else segment)

    def _cross(self, adapted: str, leaving: Segment, entering: Segment | None) -> None:
        norm = self.model.get_submodule(self.names.of(adapted))
        like = _parameter(norm)
        if entering is not None:
            self.tasks.expand(entering.Q, like.device)
        enter = None if entering is None else self._enter(entering, like)
        self._swap(adapted, NormOfResidual(norm, self._leave(leaving, like), enter))

    def _expand(self, adapted: str, segment: Segment, reads: bool, gain: Tensor | None) -> None:
        """Expand one matrix, by its name in the adapter: a reader behind a norm of this `gain` or behind none, or a writer."""
        name = self.names.of(adapted)
        module, stored = self.model.get_submodule(name), weight_of(self.model, name)
        weight = stored.data.T if self.layout.conv1d else stored.data
        Q = segment.Q.to(weight.device)
        blocks = [(task.readers if reads else task.writers).get(adapted) for task in self.adapter.tasks]
        check_blocks(blocks, weight, segment, reads, f"{self.origin}: {adapted}")
        expanded = reader_weight(weight, Q, blocks, gain) if reads else writer_weight(weight, Q, blocks)
        biases = [task.biases.get(adapted) for task in self.adapter.tasks]
        table = bias_table(getattr(module, "bias", None), biases, weight, None if reads else Q)
        self.state.transposed[name] = self.layout.conv1d
        self._swap(adapted, ExpandedLinear(expanded, table, self.tasks))
        stored.data = stored.data.new_empty(0)

    def _swap(self, adapted: str, module: nn.Module) -> None:
        self.state.swap(self.model, self.names.of(adapted), module)


def _through_edge(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    edge: Any = layer.latte_edge
    if args:
        return (edge(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edge(kwargs["hidden_states"])}


def _parameter(module: nn.Module) -> Tensor:
    """A parameter of the module that tells its device and dtype; of a norm, its gain."""
    weight = getattr(module, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else next(p for p in module.parameters() if p.is_floating_point()).detach()
