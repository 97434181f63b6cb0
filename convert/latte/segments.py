"""Segments: where the layers are cut into runs with a basis of their own, and the search for the cheapest cut.

One segment is the paper's single pass through the network; more of them need a smaller basis each for the same captured energy,
and two thin products at every cut. Post-norm encoders leave and enter at every norm anyway, so that a basis for each layer costs
them no time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from adapt_convert.convert.delta import Delta
from adapt_convert.convert.latte.basis import cut, find_basis
from adapt_convert.convert.latte.deltas import Effective, Matrix, scaled
from adapt_convert.convert.options import Options
from adapt_convert.convert.progress import Progress
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import Segment

Result = TypeVar("Result")

# What a cut costs besides its products, in weights read: the launches of some three small operations, about 10 us, in which a
# memory of 20 GB/s delivers 200 kB. Only the order of magnitude matters.
_CUT_OVERHEAD = 50_000


def find_segments(tasks: Sequence[Effective], options: Options, progress: Progress) -> tuple[list[Segment], list[dict[str, Any]]]:
    """The runs of layers with their bases, common to all tasks, and what a search for them tried.

    Each task weighs alike, however large its changes. With `--segments auto` the numbers of segments 1, 2, 4 .. and one per
    layer are tried at the asked energy, one after the other, so that memory holds one Gram matrix at a time.
    """
    first = tasks[0]
    scales = [1.0] if len(tasks) == 1 else [_norm(task, progress) for task in tasks]
    asked = options.segments or (first.layers if first.layout.post_norms else 1)
    if isinstance(asked, int):
        return _bases(tasks, scales, asked, options, progress), []
    powers = [2**i for i in range(first.layers.bit_length()) if 2**i < first.layers]
    tried = [_bases(tasks, scales, count, options, progress) for count in (*powers, first.layers)]
    costs = [predicted_cost(first, segments, len(tasks)) for segments in tried]
    rows = [
        {"segments": len(segments), "ranks": [s.rank for s in segments], "predicted_cost": cost}
        for segments, cost in zip(tried, costs, strict=True)
    ]
    return tried[costs.index(min(costs))], rows


def _bases(tasks: Sequence[Effective], scales: list[float], count: int, options: Options, progress: Progress) -> list[Segment]:
    first, segments = tasks[0], []
    for run in progress(cut(first.layers, count), f"finding bases of {count} segments"):

        def stream(work: Callable[[Matrix, Delta], Any], run: range = run) -> Iterator[Any]:
            for task, scale in zip(tasks, scales, strict=True):
                yield from changed(task, run, functools.partial(_scaled_work, work, scale))

        Q, _, spectra = find_basis(stream, first.width, options.rank, options.energy, options.seed, first.pairs.device)
        if len(tasks) == 1:
            first.spectra |= spectra
        segments.append(Segment(run.start, run.stop, Q.cpu()))
    return segments


def _scaled_work(work: Callable[[Matrix, Delta], Any], scale: float, matrix: Matrix, delta: Delta) -> Any:
    return work(matrix, delta if scale == 1.0 else scaled(delta, 1.0 / scale))


def changed(effective: Effective, layers: range, work: Callable[[Matrix, Delta], Result]) -> Iterator[Result]:
    """`work(matrix, effective delta)` of every changed matrix of some layers."""

    def unless_same(matrix: Matrix, delta: Delta | None) -> Result | None:
        return work(matrix, delta) if delta is not None else None

    for _, result in effective.each([m for m in effective.matrices if m.layer in layers], unless_same):
        if result is not None:
            yield result


def _norm(effective: Effective, progress: Progress) -> float:
    layers = progress(range(effective.layers), "weighing tasks")
    total = sum(sum(changed(effective, range(layer, layer + 1), lambda matrix, delta: delta.energy())) for layer in layers)
    if total == 0:
        origin = effective.pairs.source.origin
        raise AdaptError(f"{origin}: none of the targeted matrices changed; leave it out, as rows of task 0 are the base")
    return math.sqrt(total)


def predicted_cost(effective: Effective, segments: Iterable[Segment], tasks: int = 1) -> int:
    """Weights that decoding one token reads besides the base's: `(T + 1) R` for every channel of a matrix's far side, and the edges."""
    total = 0
    for segment in segments:
        far = sum(effective.shape(m)[0 if m.reads else 1] for m in effective.matrices if m.layer in segment.layers)
        norms = len(effective.layout.post_norms) * len(segment.layers)
        edges = norms * 2 * segment.rank if norms else (tasks + 2) * segment.rank
        total += (tasks + 1) * segment.rank * far + edges * effective.width + (norms or 1) * _CUT_OVERHEAD
    return total
