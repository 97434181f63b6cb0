"""Several adapters of one base in one, as a LatTE or as a shared LoRA; and what such bundles of several ranks would be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapt_convert.convert.conversion import Conversion
from adapt_convert.convert.latte.bundle import bundle as bundle_latte
from adapt_convert.convert.options import Options
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.rank_for_budget import largest_rank
from adapt_convert.convert.shared_lora.bundle import bundle_loras
from adapt_convert.formats.safetensors_file import safetensors_size

_FIRST_RANK, _LAST_RANK = 4, 128
_WHOLE = 1 - 1e-4  # captured energy of an adapter that a larger rank has nothing to add to: what rounding to bfloat16 leaves is less


def bundle(
    base: str | Path, sources: Sequence[str | Path], *, to: str = "latte", progress: Progress = silent, **options: Any
) -> Conversion:
    """Put several fine-tunes or adapters of `base` into one adapter whose tasks can be mixed in one batch; task k is the k-th source.

    `to` is `latte` (convert/latte/bundle.py) or `shared-lora` (convert/shared_lora/bundle.py). Raises `AdaptError`.
    """
    if to == "shared-lora":
        return bundle_loras(base, sources, progress=progress, **options)
    return bundle_latte(base, sources, progress=progress, to=to, **options)


def foresee_bundles(
    base: str | Path, sources: Sequence[str | Path], *, to: str = "latte", progress: Progress = silent, **options: Any
) -> Iterator[dict[str, Any]]:
    """What `bundle` would write at ranks 4 to 128, or at the size that the options give; nothing is written.

    Ranks are doubled until every adapter is held whole. Each is solved for as `bundle` does it, since a basis of one rank does not follow
    from that of another. A row has `options`, `bytes` and `bytes_exact` of the weights, `captured_energy` of all adapters together, and
    that of each under `tasks`, None of one that changes nothing. Raises `AdaptError`.
    """
    given = {name: options[name] for name in ("rank", "energy", "budget", "target_kl") if options.get(name) is not None}
    rank = _FIRST_RANK
    while True:
        made = bundle(base, sources, to=to, progress=progress, **(options if given else options | {"rank": rank}))
        named = " ".join(f"--{name} {value}" for name, value in (given or {"rank": rank}).items())
        tensors: Any = made.adapter.tensors()
        yield {
            "options": f"--to {to} {named}",
            "bytes": safetensors_size(tensors, {"format": "pt"}),
            "bytes_exact": sum(tensor.nbytes for tensor in made.adapter.exact.values()),
            "captured_energy": made.report["captured_energy"],
            "tasks": made.report["tasks"],
        }
        most = min(_LAST_RANK, largest_rank(made.plan, Options(to="latte" if to == "latte" else "lora")))
        if given or rank >= most or all(share is None or share > _WHOLE for share in made.report["tasks"].values()):
            return
        rank = min(2 * rank, most)
