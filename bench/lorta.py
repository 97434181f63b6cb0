"""The CP solver of LoRTA against `tensorly.decomposition.parafac`: fit and time, and how its time grows.

    python bench/lorta.py --json lorta.json           # the full table, an hour on two cores
    python bench/lorta.py --small

Random tensors `d x d_h x heads x layers x matrices` with a known share of noise. The solver gets them as deltas, one per layer and
matrix, as it gets those of a model; tensorly gets the whole tensor, float32, from its SVD start and stops at its own tolerance. They
take turns. The fit is the captured energy, computed for both by forming the whole approximation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
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
    Case((576, 64, 8, 30, 4), 16, 64, 0.5),
    Case((576, 64, 8, 30, 4), 16, 0, 0.0),
    Case((1024, 64, 16, 8, 4), 16, 64, 0.5),
]
GROWTH_BASE = (512, 64, 8, 8, 4)


def ours(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """The approximation from `fit_cp`."""
    d, d_h, heads, layers, matrices = tensor.shape
    shape = CPShape(d, d_h, layers, (heads,), (0,) * matrices)
    fit = fit_cp(slabs_of(tensor), shape, rank)
    factors = fit.factors
    return torch.einsum(LETTERS, factors.A, factors.B, factors.C_h[0], factors.C_l, factors.C_m)


def slabs_of(tensor: torch.Tensor) -> list[Slab]:
    def loader(layer: int, matrix: int) -> Callable[[], Delta]:
        return lambda: DenseDelta(tensor[:, :, :, layer, matrix].transpose(1, 2).flatten(1).contiguous())

    return [Slab(layer, matrix, loader(layer, matrix)) for layer in range(tensor.shape[3]) for matrix in range(tensor.shape[4])]


def theirs(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """The approximation from tensorly's `parafac`."""
    approximation: torch.Tensor = tensorly.cp_to_tensor(parafac(tensor, rank, init="svd", random_state=0))
    return approximation


def timed(call: Callable[[torch.Tensor, int], torch.Tensor], tensor: torch.Tensor, rank: int) -> tuple[float, float]:
    """Seconds and captured energy."""
    start = time.perf_counter()
    approximation = call(tensor, rank)
    seconds = time.perf_counter() - start
    energy = float(tensor.double().square().sum())
    return seconds, 1 - float((tensor - approximation).double().square().sum()) / energy


def compare(case: Case, runs: int) -> dict[str, Any]:
    tensor = case.tensor()
    times: dict[str, list[float]] = {"adapt-convert": [], "tensorly": []}
    fits = {}
    for _ in range(runs):
        for name, call in (("adapt-convert", ours), ("tensorly", theirs)):
            seconds, fits[name] = timed(call, tensor, case.rank)
            times[name].append(seconds)
            print(f"{case.name}: {name} {seconds:.2f} s, captures {fits[name]:.5f}", file=sys.stderr, flush=True)
    ratios = [slow / fast for slow, fast in zip(times["tensorly"], times["adapt-convert"], strict=True)]
    seconds_of = {name: statistics.median(own) for name, own in times.items()}
    return {"case": case.name, "seconds": seconds_of, "captured_energy": fits, "times_faster": statistics.median(ratios)}


def growth(rank: int, runs: int) -> list[dict[str, Any]]:
    """Seconds of the solver with one size doubled at a time."""
    sizes = {"base": GROWTH_BASE, "2 d": (1024, 64, 8, 8, 4), "2 L": (512, 64, 8, 16, 4), "2 r": GROWTH_BASE}
    found: list[dict[str, Any]] = []
    for name, size in sizes.items():
        own = 2 * rank if name == "2 r" else rank
        case = Case(size, own, 4 * rank, 0.5)
        tensor = case.tensor()
        seconds = statistics.median(timed(ours, tensor, own)[0] for _ in range(runs))
        base = found[0]["seconds"] if found else seconds
        found.append({"what": name, "case": case.name, "seconds": seconds, "over_base": seconds / base})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="Small tensors and no growth: seconds.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tensorly.set_backend("pytorch")
    torch.set_grad_enabled(False)
    results = [compare(case, args.runs) for case in (SMALL if args.small else FULL)]
    rows = []
    for result in results:
        seconds, fits = result["seconds"], result["captured_energy"]
        pairs = [f"{values[name]:{form}}" for values, form in ((seconds, ".2f"), (fits, ".5f")) for name in seconds]
        rows.append([result["case"], *pairs, f"{result['times_faster']:.1f}"])
    header = ["tensor", "s", "s, tensorly", "captured", "captured, tensorly", "x faster"]
    print(measuring.table(header, rows))
    grown = [] if args.small else growth(8, args.runs)
    if grown:
        cells = [[row["what"], row["case"], f"{row['seconds']:.2f}", f"{row['over_base']:.2f}"] for row in grown]
        print("\n" + measuring.table(["size", "tensor", "s", "/ base"], cells))
    versions = measuring.machine("adapt-convert", "torch", "tensorly")
    measuring.save({**versions, "comparison": results, "growth": grown}, args.json)


if __name__ == "__main__":
    main()
