"""The CP solver of LoRTA against `tensorly.decomposition.parafac`: fit and time, and how its time grows.

    python bench/lorta.py --json lorta.json           # the full table, about ten minutes on two cores
    python bench/lorta.py --small

Random tensors `d x d_h x heads x layers x matrices` with a known share of noise. The solver gets them as deltas, one per layer and
matrix, each laid out as a model's would be; tensorly gets the whole tensor, float32, from its SVD start and stops at its own tolerance.
They take turns, but on the large tensors tensorly has one turn. Timed is the fit alone, wall and CPU seconds (of all threads). The
fit's quality is the captured energy, computed for both by forming the whole approximation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import tensorly
import torch
from tensorly.decomposition import parafac

from adapt_convert.convert.delta import Delta, DenseDelta
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPShape, Slab

LETTERS = "ar,jr,hr,lr,mr->ajhlm"


@dataclass(frozen=True)
class Case:
    """`sizes`: d, d_h, heads, layers, matrices; `planted`: columns of the tensor, 0 for noise alone; `noise`: its norm over theirs."""

    sizes: tuple[int, int, int, int, int]
    rank: int
    planted: int
    noise: float

    def tensor(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        rest = torch.randn(self.sizes, generator=draw)
        if not self.planted:
            return rest
        factors = [torch.randn(size, self.planted, generator=draw) for size in self.sizes]
        signal = torch.einsum(LETTERS, *factors)
        return signal + self.noise * signal.norm() / rest.norm() * rest

    @property
    def name(self) -> str:
        content = f"{self.planted} columns, noise {self.noise:g}" if self.planted else "noise alone"
        return f"{' x '.join(map(str, self.sizes))}, {content}, rank {self.rank}"


SMALL = [Case((96, 16, 4, 6, 4), 8, 8, 0.1), Case((96, 16, 4, 6, 4), 8, 8, 2.0), Case((96, 16, 4, 6, 4), 8, 0, 0.0)]
FULL = [
    Case((576, 64, 8, 30, 4), 16, 16, 0.1),
    Case((576, 64, 8, 30, 4), 16, 64, 2.0),
    Case((576, 64, 8, 30, 4), 16, 0, 0.0),
    Case((1024, 64, 16, 8, 4), 16, 64, 0.5),
]
GROWTH_BASE = (512, 64, 8, 8, 4)


@dataclass(frozen=True)
class Fit:
    """`wall` and `cpu` seconds, and the share of the tensor's energy that the fit holds."""

    wall: float
    cpu: float
    captured: float


def ours(tensor: torch.Tensor) -> Callable[[int], list[torch.Tensor]]:
    """`fit_cp` as a function of the rank, for deltas that are laid out before the clock starts."""
    d, d_h, heads, layers, matrices = tensor.shape
    shape = CPShape(d, d_h, layers, (heads,), (0,) * matrices)
    slabs = slabs_of(tensor)

    def fit(rank: int) -> list[torch.Tensor]:
        factors = fit_cp(slabs, shape, rank).factors
        return [factors.A, factors.B, factors.C_h[0], factors.C_l, factors.C_m]

    return fit


def slabs_of(tensor: torch.Tensor) -> list[Slab]:
    def loader(layer: int, matrix: int) -> Callable[[], Delta]:
        weight = tensor[:, :, :, layer, matrix].transpose(1, 2).flatten(1).contiguous()
        return lambda: DenseDelta(weight)

    return [Slab(layer, matrix, loader(layer, matrix)) for layer in range(tensor.shape[3]) for matrix in range(tensor.shape[4])]


def theirs(tensor: torch.Tensor) -> Callable[[int], list[torch.Tensor]]:
    """tensorly's `parafac` as a function of the rank."""

    def fit(rank: int) -> list[torch.Tensor]:
        weights, factors = parafac(tensor, rank, init="svd", random_state=0)
        return [factors[0] * weights, *factors[1:]]

    return fit


SOLVERS = {"adapt-convert": ours, "tensorly": theirs}


def timed(solver: str, tensor: torch.Tensor, rank: int) -> Fit:
    call = SOLVERS[solver](tensor)
    wall, cpu = time.perf_counter(), time.process_time()
    factors = call(rank)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    missed = (tensor - torch.einsum(LETTERS, *factors)).flatten(1).norm(dim=1).double().square().sum()
    energy = tensor.flatten(1).norm(dim=1).double().square().sum()
    return Fit(wall, cpu, 1 - float(missed / energy))


def compare(case: Case, runs: int, theirs_too: int) -> dict[str, Any]:
    """Medians of `runs` fits, `theirs_too` of them with tensorly in turn."""
    tensor = case.tensor()
    fits: dict[str, list[Fit]] = {name: [] for name in SOLVERS}
    for turn in range(runs):
        for name in SOLVERS if turn < theirs_too else ["adapt-convert"]:
            fit = timed(name, tensor, case.rank)
            fits[name].append(fit)
            print(f"{case.name}: {name} {fit.wall:.3f} s, {fit.cpu:.3f} s CPU, captures {fit.captured:.6f}", file=sys.stderr, flush=True)
    wall, cpu = ({name: statistics.median(getattr(fit, what) for fit in own) for name, own in fits.items()} for what in ("wall", "cpu"))
    found: dict[str, Any] = {"case": case.name, "runs": {name: len(own) for name, own in fits.items()}, "wall": wall, "cpu": cpu}
    for what in ("wall", "cpu"):
        found[f"{what}_ratio"] = found[what]["tensorly"] / found[what]["adapt-convert"]
    return found | {"captured_energy": {name: own[-1].captured for name, own in fits.items()}}


def growth(rank: int, runs: int) -> list[dict[str, Any]]:
    """CPU seconds of the solver with one size doubled at a time."""
    sizes = {"base": GROWTH_BASE, "2 d": (1024, 64, 8, 8, 4), "2 L": (512, 64, 8, 16, 4), "2 r": GROWTH_BASE}
    found: list[dict[str, Any]] = []
    for name, size in sizes.items():
        own = 2 * rank if name == "2 r" else rank
        case = Case(size, own, 4 * rank, 0.5)
        tensor = case.tensor()
        seconds = statistics.median(timed("adapt-convert", tensor, own).cpu for _ in range(runs))
        base = found[0]["cpu"] if found else seconds
        found.append({"what": name, "case": case.name, "cpu": seconds, "over_base": seconds / base})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="Small tensors and no growth: seconds.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tensorly.set_backend("pytorch")
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", message="Trying to compute SVD", category=UserWarning)  # of modes smaller than the rank
    for solver in SOLVERS:
        timed(solver, SMALL[0].tensor(), SMALL[0].rank)  # what is loaded at first use belongs to neither
    results = [compare(case, args.runs, args.runs) for case in SMALL]
    results += [] if args.small else [compare(case, args.runs, 1) for case in FULL]
    rows = []
    for result in results:
        wanted = ((result["wall"], ".3f"), (result["cpu"], ".3f"), (result["captured_energy"], ".6f"))
        pairs = [f"{values[name]:{form}}" for values, form in wanted for name in SOLVERS]
        rows.append([result["case"], *pairs, f"{result['wall_ratio']:.1f}", f"{result['cpu_ratio']:.1f}"])
    header = ["tensor", "s", "s, tensorly", "CPU s", "CPU s, tensorly", "captured", "captured, tensorly", "x faster", "x less CPU"]
    print(measuring.table(header, rows))
    grown = [] if args.small else growth(8, args.runs)
    if grown:
        cells = [[row["what"], row["case"], f"{row['cpu']:.2f}", f"{row['over_base']:.2f}"] for row in grown]
        print("\n" + measuring.table(["size", "tensor", "CPU s", "/ base"], cells))
    versions = measuring.machine("adapt-convert", "torch", "tensorly")
    measuring.save({**versions, "comparison": results, "growth": grown}, args.json)


if __name__ == "__main__":
    main()
