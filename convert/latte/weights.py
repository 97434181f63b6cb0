"""What the blocks of a LatTE stand for as changes of its base's matrices, read back from the directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, difference
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.latte.layout import Layout, layout_of, score_layout_of
from adapt_convert.convert.latte.solver import approximation
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan
from adapt_convert.convert.validation.attribution import Change, parameter_of
from adapt_convert.convert.validation.candidates import Contender, task_number
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import read_latte, segment_of


class LatteWeights:
    """One task of a LatTE. `matrices` are its low-rank changes by module: of the effective matrices, with norm gains folded in, in the
    residual construction; of q, k and v themselves in the score construction. Raises `AdaptError` for a LatTE of another architecture."""

    def __init__(self, candidate: Contender, pairs: Pairs, plan: Plan) -> None:
        self.pairs, self.plan = pairs, plan
        adapter = read_latte(candidate.location)
        model_type = pairs.base.config.get("model_type")
        if adapter.model_type != model_type:
            raise AdaptError(
                f"{candidate.path}: made for another base: adapts a {adapter.model_type}, and {pairs.base.origin} is a {model_type}"
            )
        self.task = adapter.tasks[task_number(candidate) - 1 if candidate.task else 0]
        self.is_effective = adapter.construction == "residual"
        self.matrices: dict[str, LowRankDelta] = {}
        self._norms: dict[str, tuple[str, Literal["rms", "layer"]]] = {}
        if self.is_effective:
            layout = layout_of(pairs.base.config, pairs.base.origin)
            for held, reads in ((self.task.readers, True), (self.task.writers, False)):
                for module, block in held.items():
                    self.matrices[module] = approximation(block, segment_of(adapter.segments, _layer(module)).Q, reads)
            for module in self.task.readers if not layout.post_norms else ():
                self._norms[module] = _norm_of(module, layout)
        else:
            self._read_scores()

    def _read_scores(self) -> None:
        """The factors of q, k and v by module; those of a fused matrix side by side, block-diagonal in B."""
        layout = score_layout_of(self.pairs.base.config, self.pairs.base.origin)
        scores = self.task.scores
        for owner in sorted({name.rpartition(".")[0] for name in scores}):
            block = owner.removesuffix(layout.owner)
            parts = {
                letter: LowRankDelta(scores[f"{owner}.{letter}_B"].float(), scores[f"{owner}.{letter}_A"].float())
                for letter in "qkv"
                if f"{owner}.{letter}_A" in scores
            }
            if len(layout.inputs) > 1:
                self.matrices |= {block + name: parts[x] for name, x in zip(layout.inputs, "qkv", strict=True) if x in parts}
                continue
            rows, columns = next(iter(parts.values())).shape
            whole = [parts.get(x, LowRankDelta(torch.zeros(rows, 0), torch.zeros(0, columns))) for x in "qkv"]
            B: Tensor = torch.block_diag(*(part.B for part in whole))  # type: ignore[no-untyped-call]
            self.matrices[block + layout.inputs[0]] = LowRankDelta(B, torch.cat([part.A for part in whole]))

    @property
    def values(self) -> frozenset[str]:
        """The parameters that are held by value."""
        return frozenset(self.task.exact)

    def delta(self, entry: Entry) -> Delta | None:
        """The change of one parameter of the fine-tune, as the plan has it."""
        value = self.task.exact.get(entry.name)
        if isinstance(value, Tensor):
            return self._difference(entry.name, value, entry.transposed)
        return self.matrices.get(entry.module) if entry.kind == "matrix" else None

    def rank(self, entry: Entry) -> int | None:
        held = self.matrices.get(entry.module) if entry.kind == "matrix" else None
        return held.rank if held else None

    def against(self, pairs: Pairs, plan: Plan) -> Iterator[tuple[Matrix, Delta, LowRankDelta | None]]:
        """The effective deltas of the fine-tune that `pairs` and `plan` opened, each with the LatTE's."""
        effective = Effective(pairs, plan)
        for matrix in effective.matrices:
            delta = effective.delta(matrix)
            if delta is not None:
                yield matrix, delta, self.matrices.get(matrix.module)

    def changes(self, root: nn.Module) -> list[Change]:
        """The same as `root`, the live base, takes them: matrices, biases, and the parameters held by value."""
        found = [
            Change(f"{module}.weight", lambda delta=delta: delta, norm=self._norms.get(module))  # type: ignore[misc]
            for module, delta in self.matrices.items()
        ]
        values = {f"{module}.bias": bias for module, bias in self.task.biases.items()} | dict(self.task.exact)
        for name, value in values.items():
            assert isinstance(value, Tensor)
            live = parameter_of(root, name)
            change = value.float() if live is None else value.float() - live.detach().cpu().float()
            delta = DenseDelta(change.reshape(len(change), -1))
            found.append(Change(name, lambda delta=delta: delta, shared=True))  # type: ignore[misc]
        return found

    def _difference(self, name: str, value: Tensor, transposed: bool = False) -> DenseDelta:
        key = self.plan.base_keys.get(name)
        change = (difference(value, self.pairs.base.read(key)) if key else value.float()).reshape(len(value), -1)
        return DenseDelta(change.T if transposed else change)


def _layer(module: str) -> int:
    """The number of a module's layer, the first in its path."""
    found = re.search(r"\.(\d+)\.", f".{module}")
    assert found
    return int(found[1])


def _norm_of(module: str, layout: Layout) -> tuple[str, Literal["rms", "layer"]]:
    """The norm whose output a reader reads, and whether it subtracts the mean."""
    norm, reader = next((norm, reader) for norm, readers in layout.readers.items() for reader in readers if module.endswith(f".{reader}"))
    return module.removesuffix(reader) + norm, "layer" if layout.norm == "layer" else "rms"
