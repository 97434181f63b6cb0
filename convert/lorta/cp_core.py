"""The core that the CP solver fits, and the products, normal equations and norms that its solvers share.

The core is a set of five-way tensors, one per head count, coupled through shared factors: the tensor of group `g` is

    T_g[a, m, l, h, j] ~ sum_rho A[a, rho] C_m^g[m, rho] C_l[l, rho] C_h^g[h, rho] B[j, rho].

A model is a flat list of factors `[A, B, C_l, C_h^0 .. C_h^{G-1}, C_m^0 .. C_m^{G-1}]`, each `(size, r)` float64, so group `g` uses the
positions `(0, 1, 2, 3 + g, 3 + G + g)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Model = list[Tensor]

_PROXIMAL = 1e-9  # relative weight of the old factor in a normal equation: keeps a singular one solvable, moves no digit of a good one
TINY = 1e-30  # added where a whole column or core may be zero


@dataclass(frozen=True)
class Core:
    """The tensors `T_g (k, M_g, L, heads_g, p)`, all of one dtype, and the sum of their squares."""

    tensors: tuple[Tensor, ...]
    energy: float

    @staticmethod
    def of(tensors: tuple[Tensor, ...]) -> Core:
        squares = (torch.linalg.vector_norm(tensor.flatten(1), dim=1).double().square().sum() for tensor in tensors)
        return Core(tensors, float(sum(squares, torch.zeros((), dtype=torch.float64))))

    @property
    def groups(self) -> int:
        return len(self.tensors)

    def double(self) -> Core:
        return Core.of(tuple(tensor.double() for tensor in self.tensors))

    def positions(self, group: int) -> tuple[int, int, int, int, int]:
        """Where the factors of `group` stand in a model, in the order A, B, C_l, C_h, C_m."""
        return 0, 1, 2, 3 + group, 3 + self.groups + group

    def sizes(self) -> list[int]:
        """Rows of each factor of a model."""
        first = self.tensors[0].shape
        heads = [tensor.shape[3] for tensor in self.tensors]
        matrices = [tensor.shape[1] for tensor in self.tensors]
        return [first[0], first[4], first[2], *heads, *matrices]


@dataclass(frozen=True)
class CoreFit:
    """A model, its squared error on the core (float64; from sums, so no finer than ~1e-7 of the energy in a float32 core)."""

    model: Model
    loss: float


def khatri_rao(b: Tensor, c_l: Tensor, c_h: Tensor, c_m: Tensor) -> Tensor:
    """`W (M L heads p, r)`: the rows of a core flattened after its first mode."""
    c = torch.einsum("mr,lr,hr->mlhr", c_m, c_l, c_h).reshape(-1, 1, b.shape[1])
    return (c * b).reshape(-1, b.shape[1])


def grams(core: Core, model: Model, group: int) -> Tensor:
    """`(5, r, r)`: `U^T U` of the factors of one group."""
    return torch.stack([model[n].T @ model[n] for n in core.positions(group)])


def hadamard_without(stack: Tensor) -> Tensor:
    """`(5, r, r)`: the elementwise product of all matrices of a stack but the n-th, without a division (a Gram may hold zeros)."""
    ones = torch.ones_like(stack[0])
    before, after = [ones], [ones]
    for n in range(stack.shape[0] - 1):
        before.append(before[-1] * stack[n])
        after.append(after[-1] * stack[-1 - n])
    return torch.stack([left * right for left, right in zip(before, reversed(after), strict=True)])


def solve_proximal(rhs: Tensor, normal: Tensor, old: Tensor) -> Tensor:
    """`argmin_U <U, U normal> - 2 <U, rhs> + mu ||U - old||^2`: least squares that cannot divide by zero and never goes uphill."""
    rank = normal.shape[0]
    mu = _PROXIMAL * normal.diagonal().mean() + TINY
    system = normal + mu * torch.eye(rank, dtype=normal.dtype, device=normal.device)
    solution: Tensor = torch.linalg.solve(system, rhs + mu * old, left=False)
    return solution


def solve_columns(rhs: Tensor, normal: Tensor, old: Tensor) -> Tensor:
    """`solve_proximal` with the columns taken one by one: only the diagonal of `normal` counts."""
    weights = normal.diagonal()
    mu = _PROXIMAL * weights + TINY
    return (rhs + mu * old) / (weights + mu)


def product_a(core: Core, model: Model) -> Tensor:
    """MTTKRP of the first mode, `sum_g T_g W_g (k, r)`, float64."""
    out = torch.zeros_like(model[0])
    for group, tensor in enumerate(core.tensors):
        _, b, c_l, c_h, c_m = (model[n].to(tensor.dtype) for n in core.positions(group))
        out += (tensor.flatten(1) @ khatri_rao(b, c_l, c_h, c_m)).double()
    return out


def project(core: Core, a: Tensor) -> list[Tensor]:
    """`A^T T_g (r, M_g, L, heads_g, p)`, of the core's dtype: all that the other modes need of the core."""
    return [(a.T.to(tensor.dtype) @ tensor.flatten(1)).view(-1, *tensor.shape[1:]) for tensor in core.tensors]


def product_b(core: Core, model: Model, projected: list[Tensor]) -> Tensor:
    """MTTKRP of B, `(p, r)`, float64."""
    out = torch.zeros_like(model[1])
    for group, tensor in enumerate(projected):
        _, _, c_l, c_h, c_m = (model[n].to(tensor.dtype) for n in core.positions(group))
        c = torch.einsum("mr,lr,hr->rmlh", c_m, c_l, c_h).flatten(1).unsqueeze(1)
        out += torch.bmm(c, tensor.flatten(1, 3)).squeeze(1).T.double()
    return out


def contract_b(model: Model, projected: list[Tensor]) -> list[Tensor]:
    """`(r, M_g, L, heads_g)` float64: the core contracted with A and B."""
    b = model[1].T.unsqueeze(2)
    return [torch.bmm(y.flatten(1, 3), b.to(y.dtype)).view(y.shape[:4]).double() for y in projected]


def product_c(core: Core, model: Model, small: list[Tensor], n: int) -> Tensor:
    """MTTKRP of the factor at position `n >= 2`, float64."""
    if n == 2:
        terms = (
            torch.einsum("rmlh,mr,hr->lr", tensor, model[3 + core.groups + group], model[3 + group]) for group, tensor in enumerate(small)
        )
        return sum(terms, torch.zeros_like(model[2]))
    group, is_matrix = (n - 3) % core.groups, n >= 3 + core.groups
    if is_matrix:
        return torch.einsum("rmlh,lr,hr->mr", small[group], model[2], model[3 + group])
    return torch.einsum("rmlh,lr,mr->hr", small[group], model[2], model[3 + core.groups + group])


def normal_of(core: Core, squares: Model, n: int) -> Tensor:
    """The normal matrix `(r, r)` of factor n from the Gram matrices of all factors: groups that share the factor add up."""
    total = torch.zeros_like(squares[n])
    for group in range(core.groups):
        places = core.positions(group)
        if n in places:
            others = [squares[place] for place in places if place != n]
            total += others[0] * others[1] * others[2] * others[3]
    return total


def normals(core: Core, model: Model) -> Model:
    """The normal matrices of all factors."""
    squares = [factor.T @ factor for factor in model]
    return [normal_of(core, squares, n) for n in range(len(model))]


def balance(core: Core, model: Model) -> Model:
    """The same tensor with equal column norms: per group C_h and C_m, over the model A, B, C_l, each C_h and the stacked C_m."""
    norms = [factor.norm(dim=0) for factor in model]
    units = [factor / (norm + TINY) for factor, norm in zip(model, norms, strict=True)]
    shared = norms[0] * norms[1] * norms[2]
    weights = torch.stack([shared * norms[3 + g] * norms[3 + core.groups + g] for g in range(core.groups)])
    total = weights.norm(dim=0)
    scale = total.pow(0.2)
    split = [units[3 + core.groups + g] * (weights[g] / (total + TINY) * scale) for g in range(core.groups)]
    return [unit * scale for unit in units[: 3 + core.groups]] + split
