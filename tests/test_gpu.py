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
from adapt_convert.convert.delta import moved
from adapt_convert.convert.side_by_side import side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


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
    """Sums on the caller's stream of what was made on others, whose memory goes to the next item at once."""
    blocks = [torch.randn(300, 400, generator=torch.Generator().manual_seed(n)) for n in range(200)]
    total, expected = torch.zeros(300, 300, dtype=torch.float64, device=CUDA), torch.zeros(300, 300, dtype=torch.float64)
    for n, part in side_by_side(range(len(blocks)), lambda n: 1, lambda n: moved(blocks[n], CUDA), lambda n, block: block @ block.T, CUDA):
        for _ in range(20):  # the caller's stream falls behind
            total = total * 1.0
        total += part
        expected += blocks[n].double() @ blocks[n].double().T
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-2)
