"""The core that the CP solver fits, and the products, normal equations and norms that its solvers share.

The core is a set of five-way tensors, one per head count, coupled through shared factors: the tensor of group `g` is

    T_g[a, m, l, h, j] ~ sum_rho A[rho, a] C_m^g[rho, m] C_l[rho, l] C_h^g[rho, h] B[rho, j].

A model is a flat list of factors `[A, B, C_l, C_h^0 .. C_h^{G-1}, C_m^0 .. C_m^{G-1}]`, so group `g` uses the positions
`(0, 1, 2, 3 + g, 3 + G + g)`. Each factor is `(s, r, size)` float64: `s` models of rank `r` side by side, which cost the calls of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Model = list[Tensor]

_PROXIMAL = 1e-9  # relative weight of the old factor in a normal equation: keeps a singular one solvable, moves no digit of a good one
EXACT = 1e-13  # share of the energy below which nothing is left to fit
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

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def double(self) -> Core:
        return self if self.dtype == torch.float64 else Core.of(tuple(tensor.double() for tensor in self.tensors))

    def positions(self, group: int) -> tuple[int, int, int, int, int]:
        """Where the factors of `group` stand in a model, in the order A, B, C_l, C_h, C_m."""
        return 0, 1, 2, 3 + group, 3 + self.groups + group

    def sizes(self) -> list[int]:
        """Entries of a column of each factor of a model."""
        first = self.tensors[0].shape
        heads = [tensor.shape[3] for tensor in self.tensors]
        matrices = [tensor.shape[1] for tensor in self.tensors]
        return [first[0], first[4], first[2], *heads, *matrices]


def random_model(core: Core, count: int, rank: int, generator: torch.Generator) -> Model:
    """`count` models of Gaussian factors, drawn on the CPU so that a seed means the same on every device."""
    draw = [torch.randn(count, rank, size, generator=generator, dtype=torch.float64) for size in core.sizes()]
    return [factor.to(core.tensors[0].device) for factor in draw]


def joined(core: Core, model: Model, group: int, heads: bool = True) -> Tensor:
    """`(s r, M L heads)`, or without the heads `(s r, M L)`: the entries of C_m, C_l (and C_h) multiplied, float64."""
    _, _, c_l, c_h, c_m = (model[n].flatten(0, 1) for n in core.positions(group))
    both = (c_m.unsqueeze(2) * c_l.unsqueeze(1)).flatten(1)
    return (both.unsqueeze(2) * c_h.unsqueeze(1)).flatten(1) if heads else both


def khatri_rao(core: Core, model: Model, group: int) -> Tensor:
    """`(s r, M L heads p)`: what a column has in place of a row of the core flattened after its first mode, of the core's dtype."""
    c, b = joined(core, model, group).to(core.dtype), model[1].flatten(0, 1).to(core.dtype)
    return (c.unsqueeze(2) * b.unsqueeze(1)).flatten(1)


def product_a(core: Core, model: Model) -> Tensor:
    """MTTKRP of the first mode, `sum_g T_g W_g`, `(s, r, k)` float64."""
    out = sum_of([khatri_rao(core, model, group) @ tensor.flatten(1).T for group, tensor in enumerate(core.tensors)])
    return out.double().view_as(model[0])


def project(core: Core, a: Tensor) -> list[Tensor]:
    """`A^T T_g (s r, M_g L heads_g, p)`, of the core's dtype: all that the other modes need of the core."""
    rows = a.flatten(0, 1).to(core.dtype)
    return [(rows @ tensor.flatten(1)).view(len(rows), -1, tensor.shape[4]) for tensor in core.tensors]


def product_b(core: Core, model: Model, projected: list[Tensor]) -> Tensor:
    """MTTKRP of B, `(s, r, p)` float64."""
    parts = [torch.bmm(joined(core, model, group).to(core.dtype).unsqueeze(1), y) for group, y in enumerate(projected)]
    return sum_of(parts).double().view_as(model[1])


def contract_b(core: Core, model: Model, projected: list[Tensor]) -> list[Tensor]:
    """`(s r, M_g L, heads_g)` float64: the core contracted with A and B."""
    b = model[1].flatten(0, 1).unsqueeze(2).to(core.dtype)
    parts = zip(projected, core.tensors, strict=True)
    return [torch.bmm(y, b).double().view(len(b), -1, tensor.shape[3]) for y, tensor in parts]


def product_c(core: Core, model: Model, small: list[Tensor], n: int) -> Tensor:
    """MTTKRP of the factor at position `n >= 2`, `(s, r, size)` float64."""
    if n > 2 and n < 3 + core.groups:
        heads: Tensor = torch.bmm(joined(core, model, n - 3, heads=False).unsqueeze(1), small[n - 3])
        return heads.view_as(model[n])
    parts = []
    for group in range(core.groups) if n == 2 else [n - 3 - core.groups]:
        _, _, c_l, c_h, c_m = (model[place].flatten(0, 1) for place in core.positions(group))
        rest = torch.bmm(small[group], c_h.unsqueeze(2)).view(len(c_h), c_m.shape[1], c_l.shape[1])
        parts.append(torch.bmm(c_m.unsqueeze(1), rest) if n == 2 else torch.bmm(rest, c_l.unsqueeze(2)))
    return sum_of(parts).view_as(model[n])


def sum_of(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def squares_of(model: Model) -> Model:
    """The Gram matrices `(s, r, r)` of all factors."""
    return [factor @ factor.mT for factor in model]


def normal_of(core: Core, squares: Model, n: int) -> Tensor:
    """The normal matrix `(s, r, r)` of factor n from the Gram matrices of all factors: groups that share the factor add up."""
    parts = []
    for group in range(core.groups):
        places = core.positions(group)
        if n in places:
            first, second, third, fourth = (squares[place] for place in places if place != n)
            parts.append(first * second * third * fourth)
    return sum_of(parts)


def normals(core: Core, model: Model) -> Model:
    """The normal matrices of all factors."""
    squares = squares_of(model)
    return [normal_of(core, squares, n) for n in range(len(model))]


def solve_proximal(rhs: Tensor, normal: Tensor, old: Tensor) -> Tensor:
    """`argmin_U <U, normal U> - 2 <U, rhs> + mu ||U - old||^2`: least squares that cannot divide by zero and never goes uphill."""
    mu = (normal.diagonal(dim1=-2, dim2=-1).mean(-1) * _PROXIMAL + TINY)[..., None, None]
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    solution: Tensor = torch.linalg.solve(torch.addcmul(normal, mu, eye), torch.addcmul(rhs, mu, old))
    return solution


def loss_of(core: Core, rhs: Tensor, normal: Tensor, factor: Tensor) -> Tensor:
    """`||T||^2 - 2 <T, T~> + ||T~||^2 (s,)` from the product and the normal matrix of one factor shared by all groups."""
    return core.energy + (factor * (normal @ factor - 2 * rhs)).sum((1, 2))


def balance(core: Core, model: Model) -> Model:
    """The same tensors with equal column norms: per group C_h and C_m, over the model A, B, C_l, each C_h and the stacked C_m."""
    norms = [torch.linalg.vector_norm(factor, dim=2, keepdim=True) for factor in model]
    units = [factor / (norm + TINY) for factor, norm in zip(model, norms, strict=True)]
    shared = norms[0] * norms[1] * norms[2]
    weights = torch.stack([shared * norms[3 + g] * norms[3 + core.groups + g] for g in range(core.groups)])
    total = torch.linalg.vector_norm(weights, dim=0)
    scale = total.pow(0.2)
    split = [units[3 + core.groups + g] * (weights[g] / (total + TINY) * scale) for g in range(core.groups)]
    return [unit * scale for unit in units[: 3 + core.groups]] + split
