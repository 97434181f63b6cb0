"""One budget of bytes over many matrices, spent where it captures most energy."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import Tensor


def spend_budget(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks by matrix: always the next singular value with the most energy per byte, while it fits.

    `spectra` are singular values, largest first; `costs` the bytes of one rank, `(out + in) * itemsize`. Within a matrix the
    values fall, so the greedy choice is the best spending of all but the last bytes. A matrix may get rank 0: no factors.
    """
    ranks = dict.fromkeys(spectra, 0)
    heap = [(-(float(values[0]) ** 2) / costs[name], name) for name, values in spectra.items() if len(values)]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        if costs[name] > budget:
            continue  # a cheaper matrix may still fit
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(spectra[name]):
            heapq.heappush(heap, (-(float(spectra[name][ranks[name]]) ** 2) / costs[name], name))
    return ranks
