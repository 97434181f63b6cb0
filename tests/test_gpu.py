"""Conversions on a GPU: the same as on the CPU but for rounding, the same bytes twice, and no result that another one's work overwrites.

Where there is a GPU, commands and functions use it unless told otherwise, so that most other tests run on it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_convert
from adapt_convert.convert import svd
from adapt_convert.convert.delta import DenseDelta, moved
from adapt_convert.convert.lorta import cp_stream
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPFit, CPShape, Slab
from adapt_convert.convert.lorta.solver import as_written
from adapt_convert.convert.side_by_side import side_by_side
from adapt_convert.convert.svd import factorise, fit_left

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def several_streams(few_threads: None) -> None:
    """As many matrices in work as threads: `few_threads` leaves one."""
    torch.set_num_threads(4)


@pytest.mark.parametrize("options", [{"to": "lora"}, {"to": "lora", "rank": None, "energy": 0.5}, {"to": "lorta"}, {"to": "latte"}])
def test_a_gpu_converts_as_the_cpu_does(pairs: Callable[[str], Any], options: dict[str, Any]) -> None:
    pair, options = pairs("llama"), {"rank": 4, **options}
    there, here = (adapt_convert.convert(pair.base, pair.ft, device=name, **options).report for name in ("cuda", "cpu"))
    assert there["device"] == "cuda"
    assert there["captured_energy"] == pytest.approx(here["captured_energy"], rel=1e-3)
    statuses = [{name: row["status"] for name, row in report["tensors"].items()} for report in (there, here)]
    assert statuses[0] == statuses[1]


@pytest.mark.parametrize("to", ["lora", "lorta", "latte"])
def test_a_gpu_writes_the_same_bytes_twice(pairs: Callable[[str], Any], tmp_path: Path, to: str) -> None:
    pair = pairs("llama")
    written = []
    for name in ("first", "second"):
        path = adapt_convert.convert(pair.base, pair.ft, to=to, rank=4, device="cuda").save(tmp_path / name)
        written.append({file.name: file.read_bytes() for file in path.glob("*.safetensors")})
    assert written[0] == written[1]


def test_results_are_whole_however_many_are_in_work() -> None:
    """Sums on the caller's stream, which falls behind, of what was made on others, whose memory goes to the next item at once."""
    blocks = [torch.randn(300, 400, generator=torch.Generator().manual_seed(n)) for n in range(60)]
    expected = sum(block.double() @ block.double().T for block in blocks)
    total, heavy = torch.zeros(300, 300, dtype=torch.float64, device=CUDA), torch.randn(4096, 4096, device=CUDA)
    for _, part in side_by_side(range(len(blocks)), lambda n: 1, lambda n: moved(blocks[n], CUDA), lambda n, block: block @ block.T, CUDA):
        heavy @ heavy
        total += part
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-2)


def test_work_starts_after_what_the_caller_has_asked_for() -> None:
    heavy, shared = torch.randn(8192, 8192, device=CUDA), torch.zeros(1000, device=CUDA)
    heavy @ heavy
    shared.fill_(1.0)
    found = side_by_side(range(20), lambda n: 1, lambda n: n, lambda n, loaded: float((shared * loaded).sum()), CUDA)
    assert list(found) == [(n, 1000.0 * n) for n in range(20)]


def test_directions_of_a_wide_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Krylov search, which the small models of the other tests have no use for."""
    monkeypatch.setattr(svd, "_from_gram", lambda *_: pytest.fail("the Gram matrix was formed"))
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(1200, 40, generator=draw) * torch.arange(1, 41) ** -0.5) @ torch.randn(40, 900, generator=draw)
    weight += torch.randn(1200, 900, generator=draw)
    delta, best = DenseDelta(weight.to(CUDA)), torch.linalg.svdvals(weight.double()).square()
    for exact in (True, False):
        found = factorise(delta, 16, torch.Generator().manual_seed(1), exact).truncate(16)
        B, _ = fit_left(delta, found)
        missed = float((weight.double() - B.cpu().double() @ found.A.cpu().double()).square().sum())
        assert float(best.sum()) - missed >= 0.9999 * float(best[:16].sum())


@pytest.mark.parametrize("d", [160, 600])
def test_lorta_of_deltas_that_are_read_several_times(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    """Through the Gram matrix of one side, and through a sketch of it."""
    monkeypatch.setattr(cp_stream, "_CORE_FLOATS", 0)
    monkeypatch.setattr(cp_stream, "_TINY", 0)
    shape, draw = CPShape(d, 8, 4, (4,), (0, 0)), torch.Generator().manual_seed(0)
    A, B = torch.randn(d, 4, generator=draw), torch.randn(4, 32, generator=draw)
    weights = {
        (layer, m): (A * torch.randn(4, generator=draw)) @ B + torch.randn(d, 32, generator=draw) for layer in range(4) for m in range(2)
    }

    def fit(device: torch.device) -> CPFit:
        slabs = [Slab(layer, m, lambda weight=weight: DenseDelta(weight)) for (layer, m), weight in weights.items()]
        return fit_cp(slabs, shape, 4, device=device)

    here, there = fit(torch.device("cpu")), fit(CUDA)
    factors = as_written(there.factors, torch.float32)
    missed = sum(float((weight - factors.slab(shape.group, *place).dense()).double().square().sum()) for place, weight in weights.items())
    assert there.passes > 1
    assert there.residual == pytest.approx(missed, rel=1e-5)
    assert there.residual == pytest.approx(here.residual, rel=1e-3)
