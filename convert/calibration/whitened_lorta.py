"""The LoRTA that errs least on real inputs: weighted alternating least squares from the data-free factors.

A slice X of the tensor is a delta with the residual side first (convert/lorta/cp_tensor.py), approximated by `A W^T`, where row (h, j)
of W is `B[j] * C_h[h] * C_l[l] * C_m[m]`. The inputs come in at the residual side of a reader and at the other one of a writer, so with
`C = E[x x^T]` the squared error of the outputs is, up to a constant,

    sum_readers -2 <A, C X W> + <A^T C A, W^T W>  +  sum_writers -2 <A, X C W> + <A^T A, W^T C W>,

quadratic in every factor. Each is solved for in turn, by conjugate gradients, as no weight is common to all slices. The products
`C X` and `X C` of all targeted matrices are held in memory, 4 bytes for each entry, and the moments beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapt_convert.convert.calibration.least_squares import conjugate_gradients
from adapt_convert.convert.calibration.moments import FindMoments, Moments
from adapt_convert.convert.calibration.work import Work
from adapt_convert.convert.lorta.cp_tensor import CPFactors
from adapt_convert.convert.lorta.solver import as_written, measure, slab_of
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.report import Record
from adapt_convert.formats.lorta import LortaAdapter, LortaBlock

_SWEEPS = 12
_TOLERANCE = 1e-4  # share of what the factors hold that a sweep must gain
_CG_STEPS = 12

Factors = dict[str, Tensor]  # as `CPFactors.named` has them, float32


def solve_whitened_lorta(
    work: Work, find_moments: FindMoments, options: Options, first: tuple[LortaAdapter, list[Record]]
) -> tuple[LortaAdapter, list[Record]]:
    """The data-free solution `first` with its factors fitted to the outputs; the records say what is held of the deltas themselves."""
    pairs, plan, progress = work.pairs, work.plan, work.progress
    adapter, records = first
    entries: dict[str, Entry] = {entry.module: entry for entry in plan.having("factor")}
    moments = find_moments(list(entries), {})
    blocks = []
    for block in adapter.blocks:
        factors = _fit(_Slices(pairs, block, entries, moments), block, progress)
        blocks.append(replace(block, factors=as_written(factors, adapter.dtype)))
    fitted = replace(adapter, blocks=blocks)
    measured = {record.entry: record for record in measure(pairs, plan, fitted, progress)}
    return fitted, [measured.get(record.entry, record) for record in records]


@dataclass(frozen=True)
class _Slice:
    """One slice: `P (d, H d_h)` is `C X` of a reader and `X C` of a writer, `C` by the name of its moments."""

    layer: int
    matrix: int
    P: Tensor
    moments: str
    reads: bool


class _Slices:
    """All slices of one block with their weights, and the products of the error's quadratic form with them."""

    def __init__(self, pairs: Pairs, block: LortaBlock, entries: dict[str, Entry], moments: Moments) -> None:
        self.group = block.group
        self.C: dict[str, Tensor] = {}
        self.slices: list[_Slice] = []
        for slot in block.slots:
            name = moments.name(slot.module)
            if name not in self.C:
                self.C[name] = moments.of(slot.module).to(pairs.device)
            X = slab_of(pairs.delta(entries[slot.module]), slot, block.shape(slot)[0]).dense()
            P = self.C[name] @ X if slot.transposed else X @ self.C[name]
            self.slices.append(_Slice(slot.layer, slot.matrix, P, name, slot.transposed))

    def right(self, f: Factors, part: _Slice) -> Tensor:
        """`W (H d_h, r)` of a slice."""
        return CPFactors.of(f).right(self.group, part.layer, part.matrix)

    def residual_side(self, f: Factors) -> Tensor:
        """A for the other factors as they are."""
        target, common = torch.zeros_like(f["A"]), f["A"].new_zeros(f["A"].shape[1], f["A"].shape[1])
        weights: Factors = {}
        for part in self.slices:
            W = self.right(f, part)
            target = target + part.P @ W
            if part.reads:
                weights[part.moments] = weights.get(part.moments, torch.zeros_like(common)) + W.T @ W
            else:
                common = common + W.T @ (self.C[part.moments] @ W)

        def apply(X: Tensor) -> Tensor:
            return X @ common + sum((self.C[name] @ X @ weight for name, weight in weights.items()), torch.zeros_like(X))

        return conjugate_gradients(apply, target, f["A"], _CG_STEPS)

    def projected(self, A: Tensor) -> list[tuple[Tensor, Tensor]]:
        """All that the other factors need of A: `A^T P` and `A^T C A`, or `A^T A`, of every slice."""
        inner = {part.moments: A.T @ (self.C[part.moments] @ A) for part in self.slices if part.reads}
        plain = A.T @ A
        return [(A.T @ part.P, inner[part.moments] if part.reads else plain) for part in self.slices]

    def error(self, f: Factors, projected: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The squared error of the outputs, less that of no adapter at all."""
        total = f["B"].new_zeros(())
        for part, (AP, inner) in zip(self.slices, projected, strict=True):
            W = self.right(f, part)
            gram = W.T @ (W if part.reads else self.C[part.moments] @ W)
            total = total + (inner * gram).sum() - 2 * (AP * W.T).sum()
        return total


def _fit(slices: _Slices, block: LortaBlock, progress: Progress) -> CPFactors:
    device = slices.slices[0].P.device
    f: Factors = {name: value.to(device) for name, value in block.factors.named().items()}
    error = float(slices.error(f, slices.projected(f["A"])))
    for _ in progress(range(_SWEEPS), f"fitting {block.name} to inputs"):
        trial = f | {"A": slices.residual_side(f)}
        projected = slices.projected(trial["A"])
        for name in [name for name in f if name != "A"]:
            trial[name] = _best(slices, projected, trial, name)
        fresh = float(slices.error(trial, projected))
        if not fresh < error:
            break
        gain, f, error = error - fresh, trial, fresh
        if gain <= _TOLERANCE * -error:
            break
    return CPFactors.of(f)


def _best(slices: _Slices, projected: list[tuple[Tensor, Tensor]], f: Factors, name: str) -> Tensor:
    """One factor for the others as they are. The error is quadratic in it, so differences of its gradient are products with the Hessian."""

    def gradient(value: Tensor) -> Tensor:
        value = value.detach().requires_grad_()
        with torch.enable_grad():
            found: Tensor = torch.autograd.grad(slices.error(f | {name: value}, projected), value)[0]
        return found

    constant = gradient(torch.zeros_like(f[name]))
    return conjugate_gradients(lambda value: gradient(value) - constant, -constant, f[name], _CG_STEPS)
