"""Measuring finished adapters against the fine-tune on held-out text: as files, loaded by whatever will load them later."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapt_convert.convert.architectures import vocabulary_of
from adapt_convert.convert.calibration.sampling import control_rows, sample_text
from adapt_convert.convert.calibration.texts import CalibrationText, read_text
from adapt_convert.convert.options import SELF, Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.validation.candidates import Contender, Stage, check_configs, open_contender, staged
from adapt_convert.convert.validation.fidelity import RowSums, Tally
from adapt_convert.convert.validation.live_model import model_class_of, read_config, require_run_extra, task_of
from adapt_convert.convert.validation.outputs import Batch, predict
from adapt_convert.convert.validation.reference_outputs import ReferenceOutputs
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.source import shared_lora_config_path

_OWN = 0.5  # of what a text of the fine-tune's own would show: real text of its kind showed 0.7 and 2.2, random tokens less than nothing


@dataclass(frozen=True)
class Figures:
    """Divergence from the fine-tune, nats per prediction: on the rows held out of the text, and on the control rows."""

    kl: float
    control: float


class Judge:
    """The models of one conversion on its calibration text, one at a time in memory, all in float32.

    The control rows are no part of the text: what the fine-tune itself writes, or for models that do not write, random tokens. They tell
    whether a text is unrelated to what the fine-tune is for. `base` has the figures of the untouched base. For models without a
    distribution the divergence is the squared distance of their outputs.

    `in_domain` says that the text is of the kind that the fine-tune is for: that it predicts the held-out rows better than the base does,
    in nats by at least half their divergence, which is what it would be by on text that the fine-tune wrote.
    """

    def __init__(
        self, stage: Stage, text: CalibrationText, control: Sequence[Batch], outputs: ReferenceOutputs, progress: Progress, scratch: Path
    ) -> None:
        self.stage, self.text, self.progress, self.scratch = stage, text, progress, scratch
        self._outputs, self._batches = outputs, (*text.heldout, *control)
        stage.show(stage.fine_tune)
        own = Tally()
        for number, batch in enumerate(progress(self._batches, "fine-tune on held-out text")):
            predictions, _ = predict(stage.model, batch, stage.device)
            comparison = outputs.keep_predictions(number, predictions)
            if number < len(text.heldout):
                own.add(predictions, comparison)
            if not math.isfinite(float(comparison.divergence.sum())):
                raise AdaptError(f"{stage.fine_tune.path}: its outputs on {text.name} are NaN or infinite; it cannot be calibrated to")
        of_base, elsewhere = self._sums(stage.base, "base on held-out text")
        self.base = Figures(_mean(of_base), _mean(elsewhere))
        gain = (of_base.nll.sum() - own.sums().nll.sum()) / max(of_base.targets.sum(), 1)
        self.in_domain = bool(gain > 0 and gain >= _OWN * self.base.kl)

    def figures(self, adapter: Any, name: str) -> Figures:
        """The figures of an adapter (anything with `write(directory)`), as it is read back from files; NaN counts as infinite."""
        heldout, elsewhere = self._sums(self.as_file(adapter, name), f"{name} on held-out text")
        return Figures(_mean(heldout), _mean(elsewhere))

    def as_file(self, adapter: Any, name: str) -> Contender:
        """The adapter written to a scratch directory, in place of an earlier one of that name."""
        directory = self.scratch / name
        directory.mkdir(exist_ok=True)
        adapter.write(directory)
        return open_contender(directory)

    def _sums(self, contender: Contender, what: str) -> tuple[RowSums, RowSums]:
        self.stage.show(contender)
        heldout, control = Tally(), Tally()
        for number, batch in enumerate(self.progress(self._batches, what)):
            predictions, _ = predict(self.stage.model, batch, self.stage.device)
            tally = heldout if number < len(self.text.heldout) else control
            tally.add(predictions, self._outputs.compare(number, predictions))
        return heldout.sums(), control.sums()


def _mean(sums: RowSums) -> float:
    value = float(sums.divergence.sum() / sums.items.sum())
    return value if math.isfinite(value) else math.inf


@contextlib.contextmanager
def opened_judge(pairs: Pairs, options: Options, progress: Progress) -> Iterator[Judge]:
    """A judge for the base and the source of a conversion, with scratch files that are gone at the end.

    Raises `AdaptError` without `transformers`, for models that cannot be built and for text that cannot be used.
    """
    require_run_extra("--calib runs the models")
    if shared_lora_config_path(pairs.source.location) is not None:
        taken = f"adapt-convert delta BASE {pairs.source.location.origin} --task NAME"
        raise AdaptError(f"--calib: a shared LoRA is not run; take the adapter out first: {taken}")
    base = Contender(pairs.base.origin, "base", pairs.base.location, pairs.base.store.nbytes)
    kind = "fine-tune" if pairs.source.kind == "checkpoint" else pairs.source.kind
    source = Contender(pairs.source.origin, kind, pairs.source.location, pairs.source.store.nbytes)
    whole = base if source.is_adapter else source
    config = read_config(whole.location)
    check_configs(whole, [base])
    model_class = model_class_of(whole.location)
    if model_class.main_input_name == "pixel_values":
        raise AdaptError(f"--calib: {model_class.__name__} reads images, and calibration is on text")
    task = task_of(model_class, config)
    stage = Stage(base, source, model_class, pairs.device, torch.float32)
    where = [source.location, base.location]
    with staged(stage), tempfile.TemporaryDirectory(prefix="adapt-convert-calibrate-") as scratch:
        assert options.calib is not None
        if options.calib == SELF:
            text = sample_text(stage, options.calib_tokens, task, config, options.seed, progress)
        else:
            text = read_text(options.calib, options.calib_tokens, task, config, where, options.seed)
        control = control_rows(stage, task, config, options.seed, progress)
        expected = 4 * (text.heldout_tokens + sum(batch.rows * batch.length for batch in control)) * (vocabulary_of(config) or 1)
        with ReferenceOutputs(expected) as outputs:
            yield Judge(stage, text, control, outputs, progress, Path(scratch))
