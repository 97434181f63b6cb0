"""`validate`: rerun the fine-tune, the base and every candidate, and judge whether a candidate is the fine-tune."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from adapt_convert.convert.architectures import vocabulary_of
from adapt_convert.convert.options import Options
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.validation.adapter_weights import Holdings, changes_of, measure_weights
from adapt_convert.convert.validation.attribution import Attribution, quadrature, removed_kl
from adapt_convert.convert.validation.candidates import Contender, Stage, check_configs, contenders_of, open_contender, staged
from adapt_convert.convert.validation.fidelity import UNKNOWN, Fidelity, RowSums, Tally, summarise
from adapt_convert.convert.validation.live_model import (
    Task,
    is_out_of_memory,
    model_class_of,
    positions_of,
    read_config,
    require_run_extra,
    task_of,
)
from adapt_convert.convert.validation.outputs import continue_greedily, longest, make_batches, predict
from adapt_convert.convert.validation.probe import PREDICTIONS, ProbeErrors, compare_probe, keep_probe, probe_batch, probe_modules
from adapt_convert.convert.validation.reference_outputs import ReferenceOutputs
from adapt_convert.convert.validation.result import Judged, Validation
from adapt_convert.convert.validation.speed import Speed, Work, measure_speed
from adapt_convert.convert.validation.texts import DEFAULT_MAX_TOKENS, Corpus, make_corpus, noise_images
from adapt_convert.convert.validation.verdict import Thresholds, fidelity_failures, weight_failures
from adapt_convert.formats.dtypes import torch_dtype
from adapt_convert.formats.errors import AdaptError, first_line
from adapt_convert.formats.location import Location

_PROMPTS = 8
_PROMPTS_AT_A_TIME = 4
_PROMPT_TOKENS = 32
_CONTINUATION = 32  # tokens


@dataclass(frozen=True)
class ValidationOptions:
    """How to run. `context`, `batch`, `max_tokens` count tokens, rows and tokens; `dtype` None is the fine-tune's own."""

    context: int | None = None
    batch: int = 1
    max_tokens: int = DEFAULT_MAX_TOKENS
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    speed: bool = True
    attribution: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise AdaptError(f"--batch {self.batch}: must be at least 1")
        if self.max_tokens < 2:
            raise AdaptError(f"--max-tokens {self.max_tokens}: must be at least 2")
        Options(dtype=self.dtype, device=self.device, seed=self.seed)  # refuses an unknown dtype or device, a seed out of range

    @property
    def torch_device(self) -> torch.device:
        return Options(device=self.device).torch_device()


def validate(
    base: str | Path,
    reference: str | Path,
    *candidates: str | Path,
    text: str | Path | None = None,
    token_ids: str | Path | Sequence[Sequence[int]] | None = None,
    tasks: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Validation:
    """Compare `candidates` - adapters of `base`, or whole checkpoints - with `reference`, the fine-tune.

    Every path is a directory or a Hub id. The models run on `text` (a plain or .jsonl file), on `token_ids` (a .jsonl file, or
    the rows themselves) or on a built-in corpus. `tasks` picks tasks of a bundle. `options` are the fields of
    `ValidationOptions`. One model is in memory at a time; the fine-tune's outputs wait in a temporary file.
    Raises `AdaptError` for whatever the user can mend, running out of memory among it.
    """
    chosen = ValidationOptions(**options)
    require_run_extra()
    if not candidates:
        raise AdaptError("no candidate was given; name at least one adapter or merged checkpoint")
    limits = Thresholds() if thresholds is None else thresholds
    if not isinstance(limits, Thresholds):
        raise AdaptError(f"thresholds={limits!r}: give a Thresholds(min_recovered=...)")
    if limits.max_slowdown is not None and not chosen.speed:
        raise AdaptError("--max-slowdown and --no-speed contradict each other; give one")
    with _memory_errors(chosen):
        return _Run(base, reference, candidates, text, token_ids, tasks, limits, chosen, progress).validate()


@dataclass(frozen=True)
class _Seen:
    """What running one model gave: its comparison, a look inside, greedy agreement, and the seconds that loading it took; or, with
    no comparison, why it could not be run."""

    sums: RowSums | None
    probe: ProbeErrors
    greedy: float | None = None
    load: float = 0.0
    error: str | None = None

    def figures(self, base: _Seen, seed: int) -> Fidelity:
        return summarise(self.sums, base.sums, seed) if self.sums and base.sums else UNKNOWN


class _Run:
    """The state of one validation."""

    def __init__(
        self,
        base: str | Path,
        reference: str | Path,
        candidates: Sequence[str | Path],
        text: str | Path | None,
        token_ids: str | Path | Sequence[Sequence[int]] | None,
        tasks: Sequence[str],
        thresholds: Thresholds,
        options: ValidationOptions,
        progress: Progress,
    ) -> None:
        self.base = open_contender(base, "base")
        self.fine_tune = open_contender(reference, "fine-tune")
        self.candidates = [c for path in candidates for c in contenders_of(path, tasks)]
        if tasks and not any(candidate.task for candidate in self.candidates):
            raise AdaptError(f"--tasks {','.join(tasks)}: no candidate is a bundle of several tasks")
        self.options, self.thresholds, self.progress = options, thresholds, progress
        whole = self.base if self.fine_tune.is_adapter else self.fine_tune
        self.config = read_config(whole.location)
        check_configs(whole, [c for c in (self.base, *self.candidates) if not c.is_adapter])
        model_class = model_class_of(whole.location)
        self.task: Task = task_of(model_class, self.config)
        dtype = torch_dtype(options.dtype) if options.dtype else None
        self.stage = Stage(self.base, self.fine_tune, model_class, options.torch_device, dtype)
        if self.stage.enlarged:  # the configuration of an adapter as the fine-tune is the base's
            self.config["vocab_size"] = self.stage.enlarged[1]
        self.corpus = self._corpus(model_class, text, token_ids)
        self.batches = make_batches(self.corpus, self.task, self.config, options.batch, options.seed)
        self.probe = probe_batch(self.batches)
        self.modules: list[str] = []
        self.continuation: list[torch.Tensor] = []

    def _corpus(self, model_class: Any, text: str | Path | None, token_ids: Any) -> Corpus:
        if model_class.main_input_name == "pixel_values":
            if text is not None or token_ids is not None:
                raise AdaptError(f"{model_class.__name__} reads images; leave out --text and --token-ids")
            return noise_images(self.config, self.options.seed)
        where: list[Location] = [self.fine_tune.location, self.base.location]
        return make_corpus(self.task, self.config, where, text, token_ids, self.options.context, self.options.max_tokens)

    def validate(self) -> Validation:
        holdings, spectra = measure_weights(self.base, self.fine_tune, self.candidates, self.progress, self.options.seed)
        with staged(self.stage):
            self.stage.show(self.fine_tune)
            with ReferenceOutputs(self._expected_bytes()) as outputs:
                perplexity = self._reference(outputs)
                base = self._compare(self.base, outputs)
                assert base.sums is not None
                if not math.isfinite(base.sums.divergence.sum()):
                    raise AdaptError(f"{self.base.path}: its outputs are NaN or infinite; a wider --dtype may help")
                if not base.sums.divergence.sum() > 0:
                    raise AdaptError(f"{self.base.path} and {self.fine_tune.path} give the same outputs: there is nothing to validate")
                removed = {candidate: self._removed_kl(candidate, base.probe, outputs) for candidate in self.candidates}
                seen = {self.base: base} | {contender: self._try(contender, outputs) for contender in self._in_turn()}
            figures = {c: row.figures(base, self.options.seed) for c, row in seen.items()}
            reasons = {c: self._reasons(seen[c], figures[c], figures[self.base], c, holdings[c]) for c in self.candidates}
            loads = {contender: row.load for contender, row in seen.items()}
            speeds = self._speed([candidate for candidate in self.candidates if not reasons[candidate]], loads)
        rows = [
            self._row(c, figures[c], seen[c], base.probe, speeds.get(c), holdings.get(c), reasons.get(c), removed.get(c))
            for c in (self.base, *self.candidates)
        ]
        return Validation(
            base=rows[0],
            candidates=tuple(rows[1:]),
            fine_tune=self.fine_tune,
            fine_tune_perplexity=perplexity,
            corpus=self.corpus,
            task=self.task,
            model_class=self.stage.model_class.__name__,
            device=str(self.stage.device),
            dtype=str(self.stage.dtype).removeprefix("torch."),
            batch=self.options.batch,
            seed=self.options.seed,
            speed=self.options.speed,
            attribution=self.options.attribution,
            thresholds=self.thresholds,
            spectra=spectra,
            top_k=outputs.top_k,
            enlarged=self.stage.enlarged,
        )

    def _expected_bytes(self) -> int:
        """Size of the fine-tune's logits; those of classes and features are small."""
        classes = vocabulary_of(self.config) if self.task in ("causal", "masked", "seq2seq") else None
        return self.corpus.tokens * (classes or 0) * (self.stage.dtype or torch.float32).itemsize

    def _in_turn(self) -> list[Contender]:
        """Adapters first: the base is there already, and every checkpoint takes its place."""
        return sorted(self.candidates, key=lambda candidate: not candidate.is_adapter)

    def _reference(self, outputs: ReferenceOutputs) -> float | None:
        """Run the fine-tune, keep what the others are compared with, and free it; returns its perplexity."""
        tally = Tally()
        for number, batch in enumerate(self.progress(self.batches, "fine-tune")):
            predictions, _ = predict(self.stage.model, batch, self.stage.device)
            tally.add(predictions, outputs.keep_predictions(number, predictions))
        self.modules = probe_modules(self.stage.root, vocabulary_of(self.config))
        keep_probe(self.stage, self.probe, self.modules, outputs)
        self.continuation = list(self._continuations())
        self.stage.clear()
        sums = tally.sums()
        if not math.isfinite(sums.divergence.sum()):
            raise AdaptError(f"{self.fine_tune.path}: its outputs are NaN or infinite; a wider --dtype may help")
        return summarise(sums, sums, self.options.seed).perplexity

    def _try(self, contender: Contender, outputs: ReferenceOutputs) -> _Seen:
        """An adapter that cannot be put on or run has failed, and the others go on; a checkpoint that is damaged is refused."""
        try:
            return self._compare(contender, outputs)
        except AdaptError as error:
            if not contender.is_adapter:
                raise
            self.stage.clear()  # nobody knows what it left behind
            return _Seen(None, ProbeErrors(), error=str(error))

    def _compare(self, contender: Contender, outputs: ReferenceOutputs) -> _Seen:
        seconds = self.stage.show(contender)
        tally = Tally()
        for number, batch in enumerate(self.progress(self.batches, Path(contender.path).name)):
            predictions, _ = predict(self.stage.model, batch, self.stage.device)
            tally.add(predictions, outputs.compare(number, predictions))
        probe = compare_probe(self.stage, self.probe, self.modules, outputs)
        return _Seen(tally.sums(), probe, self._greedy_agreement(), seconds)

    def _removed_kl(self, candidate: Contender, base: ProbeErrors, outputs: ReferenceOutputs) -> dict[str, float] | str | None:
        """The KL that each parameter of the candidate removes on the probe rows, in nats; or why that is not known. None if it is not
        wanted.

        Runs the base, which has to be on stage, with what the candidate's files add to it.
        """
        if not self.options.attribution:
            return None
        reference = outputs.fetch(PREDICTIONS, self.stage.device)
        if not base.kl or reference is None:
            return "the outputs are no distribution"
        try:
            changes = changes_of(self.base, self.fine_tune, candidate, self.stage.root)
            nodes = self.progress(quadrature()[0], f"{Path(candidate.path).name} by matrix")
            return removed_kl(self.stage.root, self.probe, reference, changes, list(nodes))
        except (AdaptError, MemoryError, RuntimeError) as error:
            if isinstance(error, AdaptError):
                return str(error)
            return "not enough memory for the gradients" if is_out_of_memory(error) else f"no gradients: {first_line(error)[:200]}"

    def _continuations(self) -> Iterator[torch.Tensor]:
        """Greedy continuations `(tokens,)` of the starts of the first rows; none for a model that does not write."""
        if self.task != "causal":
            return
        limit = positions_of(self.config) or sys.maxsize
        prompts = [row[: max(1, min(_PROMPT_TOKENS, len(row) // 2))] for row in self.corpus.rows[:_PROMPTS]]
        for length, group in groupby(prompts, key=len):
            equal = torch.stack(list(group)).to(self.stage.device)
            for rows in torch.split(equal, _PROMPTS_AT_A_TIME):
                try:
                    tokens = list(continue_greedily(self.stage.model, rows, min(_CONTINUATION, limit - length)))
                except AdaptError:
                    return
                yield from torch.stack(tokens, dim=1).cpu()

    def _greedy_agreement(self) -> float | None:
        """Mean share of the fine-tune's continuation that is written before the first other token."""
        shares = [
            float((mine == theirs).int().cumprod(0).float().mean())
            for mine, theirs in zip(self._continuations(), self.continuation, strict=False)
        ]
        return statistics.fmean(shares) if shares else None

    def _reasons(self, seen: _Seen, found: Fidelity, base: Fidelity, candidate: Contender, holdings: Holdings) -> list[str]:
        if seen.error:
            return [seen.error]
        reasons = fidelity_failures(self.thresholds, found, base)
        ignored = self.stage.ignored.get(candidate, ())
        return reasons + weight_failures(holdings, ignored, found.recovered, candidate.is_adapter)

    def _speed(self, passed: list[Contender], loads: dict[Contender, float]) -> dict[Contender, Speed]:
        """Speed of the base and of the candidates that are the fine-tune; how fast another model is says nothing."""
        if not self.options.speed:
            return {}
        order = [self.base, *sorted(passed, key=lambda candidate: not candidate.is_adapter)]
        work = Work(longest(self.batches), self.task, positions_of(self.config))
        return measure_speed(self.stage, order, work, self.thresholds.max_slowdown, loads, self.progress)

    def _row(
        self,
        contender: Contender,
        figures: Fidelity,
        seen: _Seen,
        base: ProbeErrors,
        speed: Speed | None,
        holdings: Holdings | None,
        reasons: list[str] | None,
        removed: dict[str, float] | str | None,
    ) -> Judged:
        reasons = list(reasons or [])
        if speed and speed.verdict is False:
            reasons.append(f"{speed.slowdown:.3g} x the base's time > {self.thresholds.max_slowdown:g} (--max-slowdown)")
        return Judged(
            contender=contender,
            fidelity=figures,
            greedy_agreement=seen.greedy,
            embedding_cosine=seen.probe.cosine if self.task != "causal" else None,
            attribution=self._attribution(removed, seen.probe, base),
            hidden_error=seen.probe.hidden_error(),
            hidden_recovered=seen.probe.recovered(base, "hidden"),
            output_recovered=seen.probe.recovered(base, "modules"),
            holdings=holdings,
            speed=speed,
            reasons=tuple(reasons),
            passed=None if contender == self.base else not reasons,
        )

    def _attribution(self, removed: dict[str, float] | str | None, found: ProbeErrors, base: ProbeErrors) -> Attribution | str | None:
        if not isinstance(removed, dict) or not base.kl or found.kl is None:
            return None if isinstance(removed, dict) else removed
        shares = {name: nats / base.kl for name, nats in removed.items()}
        ids = self.probe.inputs.get("input_ids")
        return Attribution(shares, 1 - found.kl / base.kl, self.probe.rows, ids.numel() if ids is not None else self.probe.rows)


@contextlib.contextmanager
def _memory_errors(options: ValidationOptions) -> Iterator[None]:
    """Running out of memory, as PyTorch reports it on either device, in one line that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            context = options.context or "256"
            raise AdaptError(
                f"out of memory at --context {context} --batch {options.batch}: lower --batch or --context, "
                "or give --dtype bfloat16, or --device cpu if this was a GPU"
            ) from None
        raise
