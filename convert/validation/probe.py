"""A look inside: how near the hidden states and the output of every single matrix are to the fine-tune's, on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.validation.candidates import Stage
from adapt_convert.convert.validation.outputs import Batch, longest, predictions_of, run
from adapt_convert.convert.validation.reference_outputs import ReferenceOutputs, total_divergence

PROBE_TOKENS = 256  # of the first rows: enough for stable ratios, and a 7 B model's outputs stay near 1 GB on the disk
PROBE_IMAGES = 8
PREDICTIONS = "probe-predictions"  # the name under which the fine-tune's are kept


@dataclass
class ProbeErrors:
    """Squared distances to the fine-tune, summed over the probe tokens, and the fine-tune's own squared norms.

    `hidden` and `hidden_norm` by layer (the embedding first), `modules` and `module_norms` by module name; `cosine` is the mean
    cosine of the mean-pooled last hidden states. `kl` is `KL(fine-tune || model)` summed over the predictions, in nats; None
    for a model without a distribution.
    """

    hidden: dict[str, float] = field(default_factory=dict)
    hidden_norm: dict[str, float] = field(default_factory=dict)
    modules: dict[str, float] = field(default_factory=dict)
    module_norms: dict[str, float] = field(default_factory=dict)
    cosine: float | None = None
    kl: float | None = None

    def hidden_error(self) -> dict[str, float]:
        """Relative error `||h - h_ft|| / ||h_ft||` by layer."""
        return {name: (error / self.hidden_norm[name]) ** 0.5 for name, error in self.hidden.items() if self.hidden_norm[name] > 0}

    def recovered(self, base: ProbeErrors, what: str) -> dict[str, float]:
        """`1 - error / error of the base` by layer (`hidden`) or matrix (`modules`); left out where the base has no error."""
        mine, theirs = getattr(self, what), getattr(base, what)
        return {name: 1 - mine[name] / error for name, error in theirs.items() if error > 0 and name in mine}


def probe_batch(batches: list[Batch]) -> Batch:
    """The first of the longest rows, as many as hold `PROBE_TOKENS` tokens and at least one, or `PROBE_IMAGES` images."""
    first = longest(batches)
    ids = first.inputs.get("input_ids")
    rows = PROBE_IMAGES if ids is None else max(1, PROBE_TOKENS // ids.shape[1])
    shape = {name: value.shape[1:] for name, value in first.inputs.items()}
    alike = [batch for batch in batches if {name: value.shape[1:] for name, value in batch.inputs.items()} == shape][:rows]
    inputs = {name: torch.cat([batch.inputs[name] for batch in alike])[:rows] for name in first.inputs}
    scored = torch.cat([batch.scored for batch in alike if batch.scored is not None])[:rows] if first.scored is not None else None
    if ids is not None:
        inputs = {name: value[:, :PROBE_TOKENS] for name, value in inputs.items()}
    return Batch(inputs, None, None if scored is None else scored[:, :PROBE_TOKENS])


def probe_modules(root: nn.Module, vocabulary: int | None) -> list[str]:
    """Names of the matrices inside the layers: the head's output is the logits, which are compared anyway."""
    names = []
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and isinstance(weight, Tensor) and vocabulary not in weight.shape:
            names.append(name)
    return names


def keep_probe(stage: Stage, batch: Batch, names: list[str], outputs: ReferenceOutputs) -> None:
    """Run the model on stage, the fine-tune, and store what it computes inside."""

    def keep(name: str, value: Tensor) -> None:
        outputs.keep(f"probe-{name}", value)

    output = _run_with_hooks(stage, batch, names, keep)
    outputs.keep(PREDICTIONS, predictions_of(output, batch, stage.device).values)
    for name, value in _hidden_states(output).items():
        keep(name, value)


def compare_probe(stage: Stage, batch: Batch, names: list[str], outputs: ReferenceOutputs) -> ProbeErrors:
    """Run the model on stage and compare with what `keep_probe` stored."""
    errors = ProbeErrors()

    def compare(name: str, value: Tensor) -> None:
        reference = outputs.fetch(f"probe-{name}", value.device)
        if reference is not None and reference.shape == value.shape:  # experts see other tokens when routing changes
            difference = torch.linalg.vector_norm(value.float() - reference.float()).double().item()
            errors.modules[name] = difference**2
            errors.module_norms[name] = torch.linalg.vector_norm(reference.float()).double().item() ** 2

    output = _run_with_hooks(stage, batch, names, compare)
    hidden = _hidden_states(output)
    predictions = predictions_of(output, batch, stage.device)
    expected = outputs.fetch(PREDICTIONS, stage.device)
    if predictions.is_logits and expected is not None:
        errors.kl = total_divergence(expected, predictions.values)
    for name, value in hidden.items():
        compare(name, value)
        if name in errors.modules:
            errors.hidden[name], errors.hidden_norm[name] = errors.modules.pop(name), errors.module_norms.pop(name)
    last = list(hidden)[-1] if hidden else None
    reference = outputs.fetch(f"probe-{last}", stage.device) if last else None
    if last and reference is not None and reference.shape == hidden[last].shape:
        pooled, mine = (value.float().flatten(1, -2).mean(1) for value in (reference, hidden[last]))
        errors.cosine = torch.nn.functional.cosine_similarity(pooled, mine).mean().item()
    return errors


def _run_with_hooks(stage: Stage, batch: Batch, names: list[str], see: Callable[[str, Tensor], None]) -> Any:
    """The model's output, with `see` called on every named module's own while it runs."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: see(name, output) if isinstance(output, Tensor) else None

    handles = []
    for name in names:
        try:
            handles.append(stage.root.get_submodule(name).register_forward_hook(hook(name)))
        except AttributeError:
            continue
    try:
        return run(stage.model, batch, stage.device, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(output: Any) -> dict[str, Tensor]:
    states: dict[str, Tensor] = {}
    for field_name, prefix in (("hidden_states", ""), ("encoder_hidden_states", "encoder "), ("decoder_hidden_states", "decoder ")):
        for number, state in enumerate(getattr(output, field_name, None) or ()):
            states[f"{prefix}{number}"] = state
    return states
