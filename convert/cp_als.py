"""CP fit of a small dense core: alternating least squares, then damped Gauss-Newton.

The core is a set of five-way tensors, one per head count, coupled through shared factors: the tensor of group `g` is

    T_g[a, m, l, h, j] ~ sum_rho A[a, rho] C_m^g[m, rho] C_l[l, rho] C_h^g[h, rho] B[j, rho].

A model is a flat list of factors `[A, B, C_l, C_h^0 .. C_h^{G-1}, C_m^0 .. C_m^{G-1}]`, each `(size, r)` float64, so group `g` uses the
positions `(0, 1, 2, 3 + g, 3 + G + g)`. Both solvers need two products with the core per iteration and nothing else of its size:
`T W` (W: the Khatri-Rao product of all modes but A) and `A^T T`, from which the products of all other modes follow cheaply.

Sources: Kolda and Bader 2009 (ALS); Tomasi and Bro 2006 and Sorber, Van Barel and De Lathauwer 2013 (Gauss-Newton: `J^T J` is applied
in closed form and its block diagonal, the normal matrices of ALS, preconditions conjugate gradients).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Model = list[Tensor]

_PROXIMAL = 1e-9  # relative weight of the old factor in a normal equation: keeps a singular one solvable, moves no digit of a good one
_TINY = 1e-30  # added where a whole column or core may be zero
_CG_STEPS = 30
_CG_TOLERANCE = 0.05  # inexact Newton: the direction need not be better than the model it minimises
_INNER = 2  # cheap sweeps over B and the C factors per product with the core
_ROUNDS = 16  # of the greedy start: one column a round up to this rank, then blocks of columns
_CANDIDATES = 32  # rank-1 searches side by side in each round
_RANK_ONE_SWEEPS = 10
_REFIT_SWEEPS = 3
_ALIKE = 0.1  # cosine above which two rank-1 terms count as one
_ALS_SWEEPS, _ALS_TOLERANCE = 40, 1e-5  # tolerance relative to the energy
_NEWTON_STEPS, _NEWTON_TOLERANCE = 150, 1e-6  # tolerance relative to the loss
_NEARLY = 0.03  # share of the energy left below which a greedy start looks for an exact fit before it adds columns
_PROBE_STEPS = 40  # Newton steps of that look
_CLOSE = 0.1  # share of the energy left below which the fit goes on in float64
_AGREED = 1e-4  # share of the energy: two starts this close have found the same fit
_NOISE = 0.5  # share of the energy left above which one start is enough
_EXACT = 1e-13  # share of the energy below which nothing is left to fit


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
    mu = _PROXIMAL * normal.diagonal().mean() + _TINY
    system = normal + mu * torch.eye(rank, dtype=normal.dtype, device=normal.device)
    solution: Tensor = torch.linalg.solve(system, rhs + mu * old, left=False)
    return solution


def solve_columns(rhs: Tensor, normal: Tensor, old: Tensor) -> Tensor:
    """`solve_proximal` with the columns taken one by one: only the diagonal of `normal` counts."""
    weights = normal.diagonal()
    mu = _PROXIMAL * weights + _TINY
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
    units = [factor / (norm + _TINY) for factor, norm in zip(model, norms, strict=True)]
    shared = norms[0] * norms[1] * norms[2]
    weights = torch.stack([shared * norms[3 + g] * norms[3 + core.groups + g] for g in range(core.groups)])
    total = weights.norm(dim=0)
    scale = total.pow(0.2)
    split = [units[3 + core.groups + g] * (weights[g] / (total + _TINY) * scale) for g in range(core.groups)]
    return [unit * scale for unit in units[: 3 + core.groups]] + split


def _loss(core: Core, rhs: Tensor, normal: Tensor, factor: Tensor) -> float:
    """`||T||^2 - 2 <T, T~> + ||T~||^2` from the product and the normal matrix of one factor shared by all groups."""
    return core.energy + float((factor * (factor @ normal - 2 * rhs)).sum())


def als_sweep(core: Core, model: Model, separate: bool = False) -> tuple[Model, float]:
    """One sweep: A exactly, then `_INNER` sweeps over all other factors on the projected core. Returns the model and its loss.

    `separate` fits every column to the core as if it were alone: many rank-1 searches at the price of one sweep (the loss is void).
    """
    model = list(model)
    squares = [factor.T @ factor for factor in model]

    def update(n: int, rhs: Tensor) -> Tensor:
        normal = normal_of(core, squares, n)
        model[n] = solve_columns(rhs, normal, model[n]) if separate else solve_proximal(rhs, normal, model[n])
        squares[n] = model[n].T @ model[n]
        return normal

    update(0, product_a(core, model))
    projected = project(core, model[0])
    for _ in range(_INNER):
        update(1, product_b(core, model, projected))
        small = contract_b(model, projected)
        for n in range(len(model) - 1, 1, -1):
            rhs = product_c(core, model, small, n)
            normal = update(n, rhs)
    return balance(core, model), _loss(core, rhs, normal, model[2])


def fit_als(core: Core, model: Model, sweeps: int, tolerance: float) -> CoreFit:
    """ALS until a sweep gains less than `tolerance` of the energy, or `sweeps` are done."""
    loss = core.energy
    for sweep in range(sweeps):
        model, new = als_sweep(core, model)
        gain, loss = loss - new, new
        if gain <= tolerance * core.energy and sweep:
            break
    return CoreFit(model, loss)


def residual_core(core: Core, model: Model) -> Core:
    """`T - T~`, a second core of the same size."""
    out = []
    for group, tensor in enumerate(core.tensors):
        a, b, c_l, c_h, c_m = (model[n].to(tensor.dtype) for n in core.positions(group))
        rest = torch.addmm(tensor.flatten(1), a, khatri_rao(b, c_l, c_h, c_m).T, alpha=-1.0)
        out.append(rest.view(tensor.shape))
    return Core.of(tuple(out))


def random_model(core: Core, rank: int, generator: torch.Generator) -> Model:
    """Gaussian factors, drawn on the CPU so that a seed means the same on every device."""
    draw = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in core.sizes()]
    return balance(core, [factor.to(core.tensors[0].device) for factor in draw])


def _rank_one_terms(core: Core, count: int, generator: torch.Generator) -> Model:
    """The best `count` rank-1 terms, no two of them alike, of `_CANDIDATES` searches made side by side; fewer if fewer are found."""
    model = random_model(core, max(_CANDIDATES, 2 * count), generator)
    for _ in range(_RANK_ONE_SWEEPS):
        model, _ = als_sweep(core, model, separate=True)
    rhs = product_a(core, model)
    explained = rhs.square().sum(0) / (normals(core, model)[0].diagonal() + _TINY)
    inner = sum((grams(core, model, group).prod(dim=0) for group in range(core.groups)), torch.zeros_like(rhs.T @ rhs))
    length = inner.diagonal().sqrt() + _TINY
    alike = (inner / length / length[:, None]).abs() > _ALIKE
    chosen: list[int] = []
    for index in explained.argsort(descending=True, stable=True).tolist():
        if len(chosen) < count and not any(bool(alike[index, other]) for other in chosen):
            chosen.append(index)
    return [factor[:, chosen] for factor in model]


def greedy_model(core: Core, rank: int, generator: torch.Generator) -> Model:
    """A start by deflation: search rank-1 terms in what the model leaves, add the best, refit all; about `_ROUNDS` rounds.

    On flat, noise-like spectra (a full fine-tune) this is worth far more than random starts: SmolLM2 at rank 16 reaches 4.6 % of the
    energy from any seed, where the best of 40 random starts stays at 4.2 % and the median at 3.6 %.
    """
    model = [torch.zeros(size, 0, dtype=torch.float64, device=core.tensors[0].device) for size in core.sizes()]
    block = -(-rank // _ROUNDS)
    while (have := model[0].shape[1]) < rank:
        rest = residual_core(core, model) if have else core
        if rest.energy <= _EXACT * core.energy:
            return [torch.nn.functional.pad(factor, (0, rank - have)) for factor in model]
        terms = _rank_one_terms(rest, min(block, rank - have), generator)
        model = [torch.cat([old, new], dim=1) for old, new in zip(model, terms, strict=True)]
        fit = fit_als(core, model, _REFIT_SWEEPS, 0.0)
        # Columns beyond an exact fit would only cancel each other, so find out whether this is one.
        model = refine(core, fit.model, _PROBE_STEPS).model if fit.loss < _NEARLY * core.energy else fit.model
    return model


class _GaussNewton:
    """`J^T J + mu I` at one model, applied in closed form, and its block-diagonal preconditioner."""

    def __init__(self, core: Core, model: Model) -> None:
        self.core, self.model = core, model
        self.normal = normals(core, model)
        self.pairs = [self._pairs(grams(core, model, group)) for group in range(core.groups)]

    @staticmethod
    def _pairs(stack: Tensor) -> Tensor:
        """`(5, 5, r, r)`: Hadamard products without modes n and m; zero where n = m."""
        count = stack.shape[0]
        out = torch.zeros(count, *stack.shape, dtype=stack.dtype, device=stack.device)
        for n in range(count):
            rest = [m for m in range(count) if m != n]
            out[n, rest] = hadamard_without(stack[rest])
        return out

    def apply(self, step: Model, mu: float) -> Model:
        out = [v @ normal + mu * v for v, normal in zip(step, self.normal, strict=True)]
        for group, pairs in enumerate(self.pairs):
            places = self.core.positions(group)
            cross = torch.stack([step[n].T @ self.model[n] for n in places])
            mixed = torch.einsum("nmab,mab->nab", pairs, cross)
            for place, n in enumerate(places):
                out[n] = out[n] + self.model[n] @ mixed[place]
        return out

    def direction(self, gradient: Model, mu: float) -> Model:
        """Preconditioned conjugate gradients for `(J^T J + mu I) s = -gradient`."""
        eye = torch.eye(self.normal[0].shape[0], dtype=torch.float64, device=gradient[0].device)
        inverse = [torch.linalg.inv(normal + mu * eye) for normal in self.normal]
        step = [torch.zeros_like(g) for g in gradient]
        residual = [-g for g in gradient]
        z = [r @ i for r, i in zip(residual, inverse, strict=True)]
        p, rho = z, _dot(residual, z)
        stop = _CG_TOLERANCE**2 * rho
        for _ in range(_CG_STEPS):
            if not rho > stop:
                break
            image = self.apply(p, mu)
            alpha = rho / _dot(p, image)
            step = [s + alpha * v for s, v in zip(step, p, strict=True)]
            residual = [r - alpha * v for r, v in zip(residual, image, strict=True)]
            z = [r @ i for r, i in zip(residual, inverse, strict=True)]
            fresh = _dot(residual, z)
            p, rho = [v + (fresh / rho) * q for v, q in zip(z, p, strict=True)], fresh
        return step


def _dot(left: Model, right: Model) -> float:
    return float(sum(((x * y).sum() for x, y in zip(left, right, strict=True)), torch.zeros((), dtype=torch.float64)))


def _gradient(core: Core, model: Model, rhs_a: Tensor, normal: Model) -> Model:
    projected = project(core, model[0])
    small = contract_b(model, projected)
    rhs = [rhs_a, product_b(core, model, projected)] + [product_c(core, model, small, n) for n in range(2, len(model))]
    return [factor @ n - r for factor, n, r in zip(model, normal, rhs, strict=True)]


def _solve_a(core: Core, model: Model) -> tuple[Model, float, Tensor]:
    """Replace A by its optimum for the other factors; also the loss there and the product it came from."""
    rhs, normal = product_a(core, model), normals(core, model)[0]
    a = solve_proximal(rhs, normal, model[0])
    return [a, *model[1:]], _loss(core, rhs, normal, a), rhs


def fit_newton(core: Core, model: Model, iterations: int, tolerance: float) -> CoreFit:
    """Levenberg-Marquardt, with A re-solved after every step (its product is at hand), until a step gains < `tolerance` of the loss."""
    model, loss, rhs = _solve_a(core, balance(core, model))
    system = _GaussNewton(core, model)
    gradient = _gradient(core, model, rhs, system.normal)
    mu, growth = 1e-3 * max(float(n.diagonal().max()) for n in system.normal) + _TINY, 2.0
    for _ in range(iterations):
        step = system.direction(gradient, mu)
        predicted = -_dot(gradient, step) - 0.5 * _dot(step, system.apply(step, 0.0))
        trial, new, trial_rhs = _solve_a(core, [f + s for f, s in zip(model, step, strict=True)])
        ratio = 0.5 * (loss - new) / predicted if predicted > 0 else -1.0
        if new < loss:
            gain, loss, model, rhs = loss - new, new, trial, trial_rhs
            mu, growth = mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
            if gain <= tolerance * loss or loss <= _EXACT * core.energy:
                break
            system = _GaussNewton(core, model)
            gradient = _gradient(core, model, rhs, system.normal)
        else:
            mu, growth = mu * growth, growth * 2
            if growth > 2**12:
                break
    return CoreFit(balance(core, model), loss)


def refine(core: Core, model: Model, steps: int = _NEWTON_STEPS) -> CoreFit:
    """ALS, then Gauss-Newton; in float64 when the fit is close, as a float32 core resolves its loss to ~1e-7 of the energy only."""
    fit = fit_als(core, model, _ALS_SWEEPS, _ALS_TOLERANCE)
    if fit.loss >= _CLOSE * core.energy:
        fit = fit_newton(core, fit.model, steps, _NEWTON_TOLERANCE)
    if fit.loss < _CLOSE * core.energy:
        fit = fit_newton(core.double(), fit.model, steps, _NEWTON_TOLERANCE)
    return fit


def fit_core(core: Core, rank: int, starts: int, seed: int) -> CoreFit:
    """The best of at most `starts` fits; greedy starts, but a random one in every third place.

    More starts are for structured data: an exact fit ends the search, so do two alike, and so does one that leaves more than half of
    the energy, as greedy starts on noise-like data end within a percent of each other.
    """
    if starts < 1:
        raise ValueError(f"fit_core: starts must be at least 1, got {starts}")
    fits: list[CoreFit] = []
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * start)
        fits.append(refine(core, (random_model if start % 3 == 2 else greedy_model)(core, rank, generator)))
        left = [fit.loss / (core.energy + _TINY) for fit in fits]
        agreed = start > 0 and abs(left[-1] - min(left[:-1])) < _AGREED
        if agreed or not _EXACT < left[-1] < _NOISE:
            break
    return min(fits, key=lambda fit: fit.loss)
