"""The one currency of the project: the change of a weight matrix, dense or in factors.

Every reader yields deltas and every solver takes them. A solver that only multiplies (a sketch, a contraction, a Gram matrix)
works on both kinds alike and never forms the product of a factored delta.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapt_convert.convert.products import has_instructions, times, transposed_times

ROUGH_SHARE = 0.999  # of a change's energy: where more is captured, what rounding to bfloat16 moves, some millionths of it, counts
_FEW_DIGITS = 1e-3  # share of ||D||^2 that is missed, below which ||D||^2 - 2 <D, B A> + ||B A||^2 has lost too many digits
_FAINT = 1e-25  # energy of a change whose products with itself float32 and bfloat16 begin to flush to zero


@dataclass(frozen=True)
class DenseDelta:
    """A change held as a full matrix: `weight` is `(out, in)`, float32.

    `spare` is bfloat16 memory for as many numbers, which `rough` may write to: fresh memory costs more time than what it saves.
    """

    weight: Tensor
    spare: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def T(self) -> DenseDelta:  # noqa: N802
        return DenseDelta(self.weight.T)

    def rows(self, start: int, stop: int) -> DenseDelta:
        """Output rows `start:stop`, one part of a fused matrix."""
        return DenseDelta(self.weight[start:stop])

    def pick(self, rows: Tensor) -> DenseDelta:
        """Output rows by number, one part of an interleaved matrix."""
        return DenseDelta(self.weight[rows.to(self.weight.device)])

    def matmul(self, x: Tensor) -> Tensor:
        """`D @ x` for `x (in, k)`, float32."""
        return times(self.weight, x)

    def rmatmul(self, x: Tensor) -> Tensor:
        """`D.T @ x` for `x (out, k)`, float32."""
        return transposed_times(self.weight, x)

    @property
    def rounds(self) -> bool:
        """Whether `rough` rounds: only where the processor gains by it."""
        return _multiplies_bfloat16(self.weight.device) and self.energy() > _FAINT

    def rough(self) -> DenseDelta | RoughDelta:
        """The same for products that only look for directions, in bfloat16 where that is faster."""
        if not self.rounds:
            return self
        if self.spare is None or not self.weight.is_contiguous():
            return RoughDelta(self.weight.bfloat16())
        return RoughDelta(self.spare[: self.weight.numel()].view(self.shape).copy_(self.weight))

    def energy(self) -> float:
        """`||D||_F^2`, as `squared_norm` has it. Computed once, however often it is asked for."""
        return self._energy

    @functools.cached_property
    def _energy(self) -> float:
        weight = self.weight if self.weight.is_contiguous() else self.weight.T
        return float(squared_norm(weight))

    def dense(self) -> Tensor:
        """The matrix itself, `(out, in)` float32."""
        return self.weight

    def to(self, device: torch.device) -> DenseDelta:
        return DenseDelta(self.weight.to(device))


@dataclass(frozen=True)
class RoughDelta:
    """A dense delta rounded to bfloat16: `weight` is `(out, in)`. Products round x and their result as well, each by up to 2^-9.

    Of a change between bfloat16 checkpoints few entries are rounded at all: one in two hundred where it is a hundredth of the
    weights, one in thirteen where it is a seventh.
    """

    weight: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        """`D @ x` for `x (in, k)`, float32 in and out."""
        return times(self.weight, x.bfloat16()).float()

    def rmatmul(self, x: Tensor) -> Tensor:
        """`D.T @ x` for `x (out, k)`, float32 in and out."""
        return transposed_times(self.weight, x.bfloat16()).float()


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for it; elsewhere such products are emulated, and slower than those in float32."""
    return device.type == "cpu" and has_instructions("avx512_bf16", "amx_bf16")


def moved(block: Tensor, device: torch.device) -> Tensor:
    """A block of a file, on a device. To a GPU it goes from pinned memory, so that the thread reads on while it is copied."""
    return block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block.to(device)


def difference(value: Tensor, before: Tensor) -> Tensor:
    """`value - before`, float32; rows beyond those of `before`, of added tokens or classes, count whole."""
    change = value.to(torch.float32, copy=True)
    common = change[: len(before)] if before.ndim else change
    common -= before
    return change


@dataclass(frozen=True)
class LowRankDelta:
    """A change held as `B @ A`: `B (out, r)`, `A (r, in)`, float32, all scaling folded into `B`."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def T(self) -> LowRankDelta:  # noqa: N802
        return LowRankDelta(self.A.T, self.B.T)

    def rows(self, start: int, stop: int) -> LowRankDelta:
        """Output rows `start:stop`, one part of a fused matrix."""
        return LowRankDelta(self.B[start:stop], self.A)

    def pick(self, rows: Tensor) -> LowRankDelta:
        """Output rows by number, one part of an interleaved matrix."""
        return LowRankDelta(self.B[rows.to(self.B.device)], self.A)

    def matmul(self, x: Tensor) -> Tensor:
        """`D @ x` for `x (in, k)`, float32."""
        return self.B @ (self.A @ x)

    def rmatmul(self, x: Tensor) -> Tensor:
        """`D.T @ x` for `x (out, k)`, float32."""
        return self.A.T @ (self.B.T @ x)

    rounds = False

    def rough(self) -> LowRankDelta:
        """Itself: its products are cheap."""
        return self

    def energy(self) -> float:
        """`||B A||_F^2 = <B^T B, A A^T>`, in float64, without the product."""
        b, a = self.B.double(), self.A.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0.0))

    def dense(self) -> Tensor:
        """The product, `(out, in)` float32."""
        return self.B @ self.A

    def to(self, device: torch.device) -> LowRankDelta:
        return LowRankDelta(self.B.to(device), self.A.to(device))

    def cast(self, dtype: torch.dtype) -> LowRankDelta:
        """The same with both factors in another dtype, as an adapter holds them."""
        return LowRankDelta(self.B.to(dtype), self.A.to(dtype))

    def padded(self, rank: int) -> LowRankDelta:
        """The same change at a larger rank: with columns of zeros in B, and as many rows in A."""
        missing = rank - self.rank
        return LowRankDelta(pad(self.B, (0, missing)), pad(self.A, (0, 0, 0, missing)))


Delta = DenseDelta | LowRankDelta

_ROWS = 256  # of a difference that are formed at a time: a 4096-wide matrix's 4 MB stay in the processor's cache


def residual_energy(delta: Delta, approximation: LowRankDelta, inner: float | None = None) -> float:
    """`||D - B A||_F^2`, in blocks of rows so that no second matrix of `D`'s size is held.

    `inner` is `<D, B A>` where a float32 product has told it: then `||D||^2 - 2 <D, B A> + ||B A||^2`, right to some 1e-7 of `||D||^2`,
    is returned without another pass, unless next to nothing is missed. Factored deltas do not use it: `D - B A = [B_d, -B][A_d; A]`.
    """
    if isinstance(delta, LowRankDelta):
        b = torch.cat([delta.B, -approximation.B], dim=1).double()
        a = torch.cat([delta.A, approximation.A], dim=0).double()
        r_b = torch.linalg.qr(b, mode="r").R
        r_a = torch.linalg.qr(a.T, mode="r").R
        return float((r_b @ r_a.T).square().sum())
    if inner is not None:
        missed = delta.energy() - 2 * inner + approximation.energy()
        if missed > _FEW_DIGITS * delta.energy():
            return missed
    total = torch.zeros((), dtype=torch.float64, device=delta.weight.device)
    buffer = torch.empty(min(_ROWS, delta.shape[0]), delta.shape[1], device=delta.weight.device)  # fresh memory costs more than the product
    for start in range(0, delta.shape[0], _ROWS):
        rows = delta.weight[start : start + _ROWS]
        block = torch.addmm(rows, approximation.B[start : start + _ROWS], approximation.A, alpha=-1.0, out=buffer[: len(rows)])
        total += squared_norm(block)
    return float(total)


def squared_norm(rows: Tensor) -> Tensor:
    """`||.||_F^2`, float64: norms of rows (the last dimension) in float32, their squares summed in float64."""
    total: Tensor = torch.linalg.vector_norm(rows, dim=-1).double().square().sum()
    return total


def inner_product(left: Tensor, right: Tensor) -> float:
    """`<left, right>` of two matrices of one shape, summed in float64."""
    return float((left.double() * right.double()).sum())
