"""The loop that distils the fine-tune's predictions into the tensors of an adapter, and nothing but those.

Knowledge distillation (Hinton, Vinyals and Dean 2015) with the KL of the predictions as the only loss; Adam with a cosine decay.
The start is candidate 0, so that what comes back is never worse on the held-out batches than what was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.calibration.cache import written
from adapt_convert.convert.calibration.teacher import Target, divergence, mean_divergence
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.validation.live_model import is_out_of_memory
from adapt_convert.convert.validation.outputs import Batch, call, predictions_of
from adapt_convert.formats.errors import AdaptError, first_line

_EVALUATIONS = 8  # of the held-out batches in a whole run
_PATIENCE = 4  # evaluations without a gain, each with half the step of the one before, after which a run ends
_LEAST_SCALE = 1e-3  # as in Adafactor: a tensor of zeros has to be able to leave them
_WARM_UP = 0.1  # of all steps: Adam's first steps know nothing of the gradients' scale


@dataclass(frozen=True)
class Trainable:
    """An adapter on a live model. `model` is what is called; `parameters` are the float32 tensors to train, by name; `adapter()` is
    the adapter of their present values, as it would be written. `refresh()` is called before every forward pass."""

    model: Any
    parameters: Mapping[str, nn.Parameter]
    adapter: Callable[[], Any]
    refresh: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Lesson:
    """What is learnt from: batches with the fine-tune's predictions on them, and others to choose and to stop by."""

    batches: Sequence[Batch]
    targets: Sequence[Target]
    heldout: Sequence[Batch]
    heldout_targets: Sequence[Target]


@dataclass
class Course:
    """How far a run is. `heldout` are the steps at which the held-out batches were measured, with their divergence; `best` and
    `best_kl` are the values with the least of them. `caution` is the share of the planned step sizes that is taken."""

    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_kl: float = math.inf
    caution: float = 1.0
    heldout: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        return min(self.heldout, key=lambda row: row[1])[0]

    @property
    def gave_up(self) -> bool:
        return len(self.heldout) - 1 - [step for step, _ in self.heldout].index(self.best_step) >= _PATIENCE


def distil(trainable: Trainable, lesson: Lesson, steps: int, rate: float, seed: int, state: Path, progress: Progress) -> Course:
    """Train for `steps` steps, or until the held-out divergence stops falling, and leave the best values in the parameters.

    `rate` is the step size at its peak as a share of each tensor's root mean square at the start (the relative step size of Adafactor,
    Shazeer and Stern 2018): how large the factors are depends on the fine-tune and differs from factor to factor. Where the held-out
    divergence has risen, training goes on from the best values with steps of half the size.
    What is needed to go on is written to `state` whenever the held-out batches have been measured, and read from there: a run that
    was killed ends with the values of one that was not. The file stays. Raises `AdaptError` when the loss is not finite.
    """
    parameters = dict(trainable.parameters)
    for value in parameters.values():
        value.requires_grad_()
    rates = [rate * max(_LEAST_SCALE, float(value.detach().square().mean().sqrt())) for value in parameters.values()]
    optimiser = torch.optim.Adam([{"params": [value], "lr": own} for value, own in zip(parameters.values(), rates, strict=True)])
    course = _resumed(state, parameters, optimiser)
    device = next(iter(parameters.values())).device

    def measure() -> None:
        trainable.refresh()
        found = mean_divergence(trainable.model, lesson.heldout, lesson.heldout_targets, device)
        course.heldout.append((course.step, found))
        if found < course.best_kl:
            course.best_kl = found
            course.best = {name: value.detach().cpu().clone() for name, value in parameters.items()}
        elif course.best:
            course.caution /= 2
            _back_to_best(course, parameters)
        _save(state, course, parameters, optimiser)

    if not course.heldout:
        measure()
    every = max(1, -(-steps // _EVALUATIONS))
    for step in progress(range(course.step, steps), "refining"):
        if course.gave_up:
            break
        for group, own in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = own * course.caution * _schedule(step, steps)
        course.losses.append(_train(trainable, lesson, _batch_of(step, len(lesson.batches), seed), optimiser, device))
        course.step = step + 1
        if course.step % every == 0 or course.step == steps:
            measure()
    for value in parameters.values():
        value.requires_grad_(False)
    _back_to_best(course, parameters)
    trainable.refresh()
    return course


def _back_to_best(course: Course, parameters: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(course.best[name])


def _train(trainable: Trainable, lesson: Lesson, number: int, optimiser: torch.optim.Optimizer, device: torch.device) -> float:
    """One step on one batch; its mean divergence before the step."""
    batch = lesson.batches[number]
    optimiser.zero_grad()
    trainable.refresh()
    loss = divergence(lesson.targets[number], predictions_of(call(trainable.model, batch, device), batch, device)).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise AdaptError("--refine: the loss is not finite (NaN or infinite); calibrate without --refine, or on other text")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise AdaptError(f"--refine: the model has no gradients: {first_line(error)[:200]}") from None
    optimiser.step()
    return value


def _schedule(step: int, steps: int) -> float:
    """The share of the full step size: a linear start, then half a cosine down to nearly nothing."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batch_of(step: int, count: int, seed: int) -> int:
    """Every batch once in an order of its own for each pass over them: a function of the step, so that a resumed run goes on alike."""
    generator = torch.Generator().manual_seed(seed + step // count)
    return int(torch.randperm(count, generator=generator)[step % count])


def _save(path: Path, course: Course, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    values = {name: value.detach().cpu() for name, value in parameters.items()}
    with written(path) as fresh:
        torch.save({"course": asdict(course), "values": values, "optimiser": optimiser.state_dict()}, fresh)


def _resumed(path: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> Course:
    """The course of an earlier run, with its values in the parameters and the optimiser; a new one if there is none."""
    if not path.is_file():
        return Course()
    try:
        kept = torch.load(path, weights_only=True, map_location="cpu")
        course = Course(**kept["course"])
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(kept["values"][name])
        optimiser.load_state_dict(kept["optimiser"])
    except Exception as error:  # whatever torch makes of a file that the disk has damaged
        raise AdaptError(f"{path}: cannot be read ({type(error).__name__}); delete it, and the refinement starts anew") from None
    return course
