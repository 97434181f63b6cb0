"""The core that the CP solver fits, and the products, normal equations and norms that its solvers share.

The core is a set of five-way tensors, one per head count, coupled through shared factors: the tensor of group `g` is

    T_g[a, m, l, h, j] ~ sum_rho A[rho, a] C_m^g[rho, m] C_l[rho, l] C_h^g[rho, h] B[rho, j].

A model is a flat list of factors `[A, B, C_l, C_h^0 .. C_h^{G-1}, C_m^0 .. C_m^{G-1}]`, so group `g` uses the positions
`(0, 1, 2, 3 + g, 3 + G + g)`. Each factor is `(r, size)`, in NumPy whatever the core's device: all but the two products with the core
is thousands of operations on a few numbers, and a call is what they cost. Its BLAS uses one thread (`single_blas_thread`). Factors are
float64, but of the core's dtype while terms are searched (convert/lorta/cp_search.py); products have the dtype of the factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapt_convert.convert.delta import squared_norm

Array = npt.NDArray[Any]
Model = list[Array]

_PROXIMAL = 1e-9  # relative weight of the old factor in a normal equation: keeps a singular one solvable, moves no digit of a good one
INNER = 2  # cheap sweeps over B and the C factors per product with the core
EXACT = 1e-13  # share of the energy below which nothing is left to fit
TINY = 1e-30  # added where a whole column or core may be zero


@dataclass(frozen=True)
class Core:
    """The tensors `T_g (k, M_g, L, heads_g, p)`, all of one dtype, and the sum of their squares."""

    tensors: tuple[Tensor, ...]
    energy: float

    @staticmethod
    def of(tensors: tuple[Tensor, ...]) -> Core:
        # Rows of heads and channels: the sum of a whole row of a large core could be off by a thousandth in float32.
        return Core(tensors, sum(float(squared_norm(tensor.flatten(3))) for tensor in tensors))

    @property
    def groups(self) -> int:
        return len(self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def double(self) -> Core:
        return self if self.dtype == torch.float64 else Core.of(tuple(tensor.double() for tensor in self.tensors))

    def tensor(self, array: Array) -> Tensor:
        """An array beside the core: on its device and of its dtype."""
        return torch.from_numpy(array).to(self.tensors[0])

    def positions(self, group: int) -> tuple[int, int, int, int, int]:
        """Where the factors of `group` stand in a model, in the order A, B, C_l, C_h, C_m."""
        return 0, 1, 2, 3 + group, 3 + self.groups + group

    def sizes(self) -> list[int]:
        """Entries of a column of each factor of a model."""
        first = self.tensors[0].shape
        heads = [tensor.shape[3] for tensor in self.tensors]
        matrices = [tensor.shape[1] for tensor in self.tensors]
        return [first[0], first[4], first[2], *heads, *matrices]


def random_model(core: Core, rank: int, generator: np.random.Generator) -> Model:
    """A model of Gaussian factors, float64."""
    return [generator.standard_normal((rank, size)) for size in core.sizes()]


def joined(core: Core, model: Model, group: int) -> Array:
    """`(r, M L heads)`: the entries of C_m, C_l and C_h multiplied."""
    _, _, c_l, c_h, c_m = (model[n] for n in core.positions(group))
    both = _outer(c_m, c_l)
    return _outer(both, c_h)


def _outer(left: Array, right: Array) -> Array:
    """`(r, m), (r, n) -> (r, m n)`: the outer product of each row."""
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def khatri_rao(core: Core, model: Model, group: int) -> Tensor:
    """`(r, M L heads p)`: what a column has in place of a row of the core flattened after its first mode, beside the core."""
    c, b = core.tensor(joined(core, model, group)), core.tensor(model[1])
    return (c.unsqueeze(2) * b.unsqueeze(1)).flatten(1)


def product_a(core: Core, model: Model) -> Array:
    """MTTKRP of the first mode, `sum_g T_g W_g`, `(r, k)`."""
    out = sum_of([khatri_rao(core, model, group) @ tensor.flatten(1).T for group, tensor in enumerate(core.tensors)])
    return as_array(out).astype(model[0].dtype, copy=False)


def project(core: Core, a: Array) -> list[Array]:
    """`A^T T_g (r, M_g L heads_g, p)`, of the core's dtype: all that the other modes need of the core."""
    rows = core.tensor(a)
    return [as_array((rows @ tensor.flatten(1)).view(len(a), -1, tensor.shape[4])) for tensor in core.tensors]


def as_array(tensor: Tensor) -> Array:
    array: Array = tensor.cpu().numpy()
    return array


def product_b(core: Core, model: Model, projected: list[Array]) -> Array:
    """MTTKRP of B, `(r, p)`."""
    parts = (joined(core, model, group).astype(y.dtype, copy=False)[:, None, :] @ y for group, y in enumerate(projected))
    out: Array = sum_of([part[:, 0].astype(model[1].dtype, copy=False) for part in parts])
    return out


def contract_b(core: Core, model: Model, projected: list[Array]) -> list[Array]:
    """`(r, M_g L, heads_g)`: the core contracted with A and B."""
    b = model[1].astype(projected[0].dtype, copy=False)[:, :, None]
    parts = zip(projected, core.tensors, strict=True)
    return [(y @ b).astype(model[1].dtype, copy=False).reshape(len(b), -1, tensor.shape[3]) for y, tensor in parts]


def product_c_h(core: Core, model: Model, small: list[Array], group: int) -> Array:
    """MTTKRP of C_h of a group, `(r, heads_g)`."""
    _, _, c_l, _, c_m = (model[n] for n in core.positions(group))
    out: Array = (_outer(c_m, c_l)[:, None, :] @ small[group])[:, 0]
    return out


def contract_heads(model: Model, small: list[Array]) -> list[Array]:
    """`(r, M_g, L)`: the core contracted with all factors but C_l and C_m."""
    parts = (each @ model[3 + group][:, :, None] for group, each in enumerate(small))
    return [part.reshape(len(part), -1, model[2].shape[1]) for part in parts]


def product_c_m(model: Model, rest: list[Array], group: int) -> Array:
    """MTTKRP of C_m of a group, `(r, M_g)`."""
    out: Array = (rest[group] @ model[2][:, :, None])[:, :, 0]
    return out


def product_c_l(core: Core, model: Model, rest: list[Array]) -> Array:
    """MTTKRP of C_l, `(r, L)`."""
    out: Array = sum_of([(model[core.positions(group)[4]][:, None, :] @ part)[:, 0] for group, part in enumerate(rest)])
    return out


def sum_of(parts: list[Any]) -> Any:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def squares_of(model: Model) -> list[Array]:
    """The Gram matrices `(r, r)` of all factors."""
    return [factor @ factor.T for factor in model]


def lengths_of(factor: Array) -> Array:
    """The norms of its columns, `(r, 1)`."""
    lengths: Array = np.sqrt(np.einsum("rn,rn->r", factor, factor))[:, None]
    return lengths


def normal_of(core: Core, squares: list[Array], n: int) -> Array:
    """The normal matrix of factor n from the Gram matrices of all factors: groups that share the factor add up."""
    parts = []
    for group in range(core.groups):
        places = core.positions(group)
        if n in places:
            first, second, third, fourth = (squares[place] for place in places if place != n)
            parts.append(first * second * third * fourth)
    out: Array = sum_of(parts)
    return out


def normals(core: Core, model: Model) -> list[Array]:
    """The normal matrices `(r, r)` of all factors."""
    squares = squares_of(model)
    return [normal_of(core, squares, n) for n in range(len(model))]


def solve_proximal(rhs: Array, normal: Array, old: Array) -> Array:
    """`argmin_U <U, normal U> - 2 <U, rhs> + mu ||U - old||^2`: least squares that cannot divide by zero and never goes uphill."""
    damped = normal.copy()
    mu = normal.trace() / len(normal) * _PROXIMAL + TINY
    damped.reshape(-1)[:: len(normal) + 1] += mu
    target = rhs + mu * old
    _, solution, failed = _dposv()(damped, target)
    if not failed:  # positive definite, also after rounding
        return np.ascontiguousarray(solution)
    out: Array = np.linalg.solve(damped, target)
    return out


@functools.cache
def _dposv() -> Callable[[Array, Array], tuple[Array, Array, int]]:
    """LAPACK's solver for positive definite matrices, imported at the first call: only LoRTA needs SciPy, whose import takes half as long
    as all others but torch's."""
    from scipy.linalg import lapack

    solver: Callable[[Array, Array], tuple[Array, Array, int]] = lapack.dposv
    return solver


def loss_of(core: Core, rhs: Array, normal: Array, factor: Array) -> float:
    """`||T||^2 - 2 <T, T~> + ||T~||^2` from the product and the normal matrix of one factor shared by all groups."""
    return core.energy + float(np.vdot(factor, normal @ factor - 2 * rhs))


def balance(core: Core, model: Model) -> Model:
    """The same tensors with equal column norms: per group C_h and C_m, over the model A, B, C_l, each C_h and the stacked C_m."""
    norms = [lengths_of(factor) for factor in model]
    units = [factor / (norm + TINY) for factor, norm in zip(model, norms, strict=True)]
    shared = norms[0] * norms[1] * norms[2]
    weights = [shared * norms[3 + g] * norms[3 + core.groups + g] for g in range(core.groups)]
    total = np.sqrt(sum_of([weight * weight for weight in weights]))
    scale = total**0.2
    split = [units[3 + core.groups + g] * (weights[g] / (total + TINY) * scale) for g in range(core.groups)]
    return [unit * scale for unit in units[: 3 + core.groups]] + split
