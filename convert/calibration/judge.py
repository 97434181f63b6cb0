"""Measuring finished adapters against the fine-tune on held-out text: as files, loaded by whatever will load them later."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adapt_convert.convert.calibration.sampling import sample_text
from adapt_convert.convert.calibration.texts import CalibrationText, read_text
from adapt_convert.convert.options import SELF, Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.validation.candidates import Contender, Stage, check_configs, open_contender, staged
from adapt_convert.convert.validation.fidelity import Tally
from adapt_convert.convert.validation.live_model import model_class_of, read_config, require_run_extra, task_of
from adapt_convert.convert.validation.outputs import predict
from adapt_convert.convert.validation.reference_outputs import ReferenceOutputs
from adapt_convert.formats.errors import AdaptError


class Judge:
    """The models of one conversion on its calibration text, one at a time in memory, all in float32.

    `base_kl` is the divergence of the untouched base from the fine-tune on the held-out rows, nats per prediction (for models without
    a distribution: squared distance of their outputs).
    """

    def __init__(self, stage: Stage, text: CalibrationText, outputs: ReferenceOutputs, progress: Progress, scratch: Path) -> None:
        self.stage, self.text, self.progress, self.scratch = stage, text, progress, scratch
        self._outputs = outputs
        stage.show(stage.fine_tune)
        for number, batch in enumerate(progress(text.heldout, "fine-tune on held-out text")):
            predictions, _ = predict(stage.model, batch, stage.device)
            comparison = outputs.keep_predictions(number, predictions)
            if not math.isfinite(float(comparison.divergence.sum())):
                raise AdaptError(f"{stage.fine_tune.path}: its outputs on {text.name} are NaN or infinite; it cannot be calibrated to")
        self.base_kl = self._measure(stage.base, "base on held-out text")

    def kl(self, adapter: Any, name: str) -> float:
        """The divergence of an adapter (anything with `write(directory)`), as it is read back from files; NaN counts as infinite."""
        return self._measure(self.as_file(adapter, name), f"{name} on held-out text")

    def as_file(self, adapter: Any, name: str) -> Contender:
        """The adapter written to a scratch directory, in place of an earlier one of that name."""
        directory = self.scratch / name
        directory.mkdir(exist_ok=True)
        adapter.write(directory)
        return open_contender(directory)

    def _measure(self, contender: Contender, what: str) -> float:
        self.stage.show(contender)
        tally = Tally()
        for number, batch in enumerate(self.progress(self.text.heldout, what)):
            predictions, _ = predict(self.stage.model, batch, self.stage.device)
            tally.add(predictions, self._outputs.compare(number, predictions))
        sums = tally.sums()
        value = float(sums.divergence.sum() / sums.items.sum())
        return value if math.isfinite(value) else math.inf


@contextlib.contextmanager
def opened_judge(pairs: Pairs, options: Options, progress: Progress) -> Iterator[Judge]:
    """A judge for the base and the source of a conversion, with scratch files that are gone at the end.

    Raises `AdaptError` without `transformers`, for models that cannot be built and for text that cannot be used.
    """
    require_run_extra("--calib runs the models")
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
        vocabulary = config.get("vocab_size", 1)
        expected = 4 * text.heldout_tokens * (vocabulary if isinstance(vocabulary, int) else 1)
        with ReferenceOutputs(expected) as outputs:
            yield Judge(stage, text, outputs, progress, Path(scratch))
