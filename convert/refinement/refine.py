"""Refining a solver's adapter on calibration text, and going on where an earlier run was killed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from adapt_convert.convert.calibration.cache import cache_path
from adapt_convert.convert.calibration.judge import Judge
from adapt_convert.convert.calibration.teacher import targets_of
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.progress import Progress
from adapt_convert.convert.refinement.trainable import RECIPES
from adapt_convert.convert.refinement.training import Lesson, distil


def refine(judge: Judge, adapter: Any, options: Options, pairs: Pairs, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """`options.refine` steps of distillation from `adapter`; the adapter of the best of them and how it went.

    The best is that of the float32 values; whether it still is after the rounding to the output dtype is for the caller to measure.
    A run that is killed leaves its state in the cache, and the same conversion takes it from there. Raises `AdaptError`.
    """
    assert options.refine is not None
    recipe = RECIPES[options.to]
    stage, text = judge.stage, judge.text
    stage.show(stage.fine_tune)
    targets = targets_of(stage.model, progress(text.fit, "fine-tune on text"), stage.device)
    heldout = targets_of(stage.model, text.heldout, stage.device)
    lesson = Lesson(text.fit, targets, text.heldout, heldout)
    state = cache_path("refinement", _made_from(judge, options, pairs))
    with recipe.attach(stage, judge.as_file(adapter, "start"), adapter) as trainable:
        course = distil(trainable, lesson, options.refine, recipe.rate, options.seed, state, progress)
        refined = trainable.adapter()
    stage.clear()  # the parameters that were trained may be part of the model on stage
    state.unlink(missing_ok=True)
    figures = {"steps": course.step, "best_step": course.best_step, "rate": recipe.rate}
    return refined, figures | {"heldout": [list(row) for row in course.heldout], "losses": course.losses}


def _made_from(judge: Judge, options: Options, pairs: Pairs) -> dict[str, Any]:
    """Everything that the course of a refinement depends on."""
    return {
        "base": pairs.base.store.content_hash(),
        "source": pairs.source.store.content_hash(),
        "text": judge.text.digest,
        "rate": RECIPES[options.to].rate,
        "options": asdict(options) | {"calib": None},
        "torch": torch.__version__,
    }
