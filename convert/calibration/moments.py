"""Second moments of what the matrices of the fine-tune are given on the calibration text: the weights of whitened solvers.

A group of modules at a time, so that memory holds the model once and a bounded number of moments; those that share an input
share its moments. They wait in the cache under the hashes of the weights and of the tokens that they were made from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.calibration.activations import captured_inputs, experts_module, groups_within, live_module, seats_of
from adapt_convert.convert.calibration.cache import cache_path, written
from adapt_convert.convert.calibration.expert_inputs import width_of
from adapt_convert.convert.calibration.texts import CalibrationText
from adapt_convert.convert.experts import Seat
from adapt_convert.convert.family import NormKind
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.validation.candidates import Stage
from adapt_convert.kernels.latte_modules import norm_eps

_AT_A_TIME = 2**30  # bytes of moments summed in one pass over the text
_RIDGE = 1e-4  # share of the mean variance added to each channel: no direction costs nothing, also where the text is shorter than C is wide


class Moments:
    """`E[x x^T]` by module, `(in, in)` float32 on the CPU, x being its input at one token, and for a norm what it makes of that before its
    gain and bias; read from files when asked for."""

    def __init__(self, directory: Path, files: dict[str, str]) -> None:
        self._directory, self._files = directory, files

    def of(self, module: str) -> Tensor:
        """The moments of a module's input, with a small ridge, so that they are positive definite."""
        C = load_file(self._directory / self._files[module])["C"]
        C.diagonal().add_(_RIDGE * C.diagonal().mean() + torch.finfo(C.dtype).tiny)
        return C

    def knows(self, module: str) -> bool:
        """Whether there are moments of a module: not of tables, which have no input."""
        return module in self._files

    def is_reached(self, module: str) -> bool:
        """Whether the module was given anything: the experts of a mixture that no token was sent to were not."""
        with safe_open(self._directory / self._files[module], "pt") as file:
            return "rows" not in file.keys() or int(file.get_tensor("rows")) > 0  # noqa: SIM118 - no mapping

    def name(self, module: str) -> str:
        """What the moments of a module are called: modules with the same input have the same."""
        return self._files[module]

    def root(self, module: str) -> Tensor:
        """A square root `L (in, in)` of the moments, `L L^T = C`, lower triangular float32 (Cholesky)."""
        root: Tensor = torch.linalg.cholesky(self.of(module).double())
        return root.float()


# What a whitened solver is given: from the names of matrices, and of norms with their kind, to their moments.
FindMoments = Callable[[Sequence[str], Mapping[str, NormKind]], Moments]


def moments_of(
    pairs: Pairs, stage: Stage, text: CalibrationText, progress: Progress, modules: Sequence[str], norms: Mapping[str, NormKind]
) -> Moments:
    """The moments of what `modules` and `norms` are given in the fine-tune, from the cache or worked out and left there."""
    made_from = {"base": pairs.base.store.content_hash(), "source": pairs.source.store.content_hash(), "text": text.digest}
    directory = cache_path("moments", made_from)
    directory.mkdir(exist_ok=True)
    index = directory / "index.json"
    files = _readable(directory, index)
    missing = [module for module in (*modules, *norms) if module not in files]
    if missing:
        stage.show(stage.fine_tune)
    for group in groups_within(missing, functools.partial(_moment_bytes, stage, seats_of(stage.root, missing)), _AT_A_TIME):
        files |= _summed(stage, group, norms, text, progress, directory)
        with written(index) as fresh:
            fresh.write_text(json.dumps(files, indent=1), encoding="utf-8")
    return Moments(directory, files)


def _readable(directory: Path, index: Path) -> dict[str, str]:
    """The modules whose moments an earlier conversion has left whole."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))
        for name in set(files.values()):
            load_file(directory / name)
    except (OSError, ValueError, SafetensorError, AttributeError):
        return {}
    return dict(files)


def _moment_bytes(stage: Stage, seats: Mapping[str, Seat], module: str) -> int:
    """What the second moments of a module's inputs take, `(in, in)` float32; `seats` are those of the experts among the modules."""
    if seat := seats.get(module):
        return 4 * width_of(experts_module(stage.root, seat.owner), seat) ** 2
    live: Any = live_module(stage.root, module)
    return 4 * int(live.weight.shape[0 if type(live).__name__ == "Conv1D" else -1]) ** 2


def _summed(
    stage: Stage, modules: Sequence[str], norms: Mapping[str, NormKind], text: CalibrationText, progress: Progress, directory: Path
) -> dict[str, str]:
    """One pass over the text: the moments of some modules, written to the directory. Returns the file of each module."""
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    rows = dict.fromkeys(modules, 0)
    for inputs in captured_inputs(stage.root, modules, progress(text.fit, "moments"), stage.device):
        if not owner:
            owner = _owners(inputs, norms)
        for name in dict.fromkeys(owner.values()):
            x = inputs[name].float()
            x = _normalised(x, stage.root.get_submodule(name), norms[name]) if name in norms else x
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] += len(x)
    experts = seats_of(stage.root, modules)
    positions = sum(batch.rows * batch.length for batch in text.fit)
    for name, total in sums.items():
        # An expert counts as often as it is reached, which is what a budget has to know; one that never is keeps the plain solution.
        C = total / (positions if name in experts else rows[name]) if rows[name] else _RIDGE * torch.eye(len(total))
        tensors = {"C": C.cpu().contiguous(), "rows": torch.tensor(rows[name])}
        with written(directory / f"{name}.safetensors") as fresh:
            save_file(tensors, fresh)
    return {module: f"{owner[module]}.safetensors" for module in modules}


def _owners(inputs: Mapping[str, Tensor], norms: Mapping[str, NormKind]) -> dict[str, str]:
    """Whose moments each module has: those of the first that is given the same tensor. A norm has its own, and so have experts that
    this batch does not reach."""
    first: dict[tuple[int, ...], str] = {}
    alone = {name for name, x in inputs.items() if name in norms or not len(x)}
    return {name: name if name in alone else first.setdefault((x.data_ptr(), *x.shape), name) for name, x in inputs.items()}


def _normalised(x: Tensor, norm: nn.Module, kind: NormKind) -> Tensor:
    d, eps = x.shape[-1:], norm_eps(norm)
    return functional.layer_norm(x, d, eps=eps) if kind == "layer" else functional.rms_norm(x, d, eps=eps)
