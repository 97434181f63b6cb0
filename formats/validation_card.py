"""A validation's figures in a model card: the Hub's `model-index` metadata, and a section for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.validation_table import enlarged_line

_BEGIN, _END = "<!-- adapt-convert validation -->", "<!-- end of adapt-convert validation -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + r"\n*", re.DOTALL)
# The block of a top-level YAML key: its line and the indented or list lines below it.
_MODEL_INDEX = re.compile(r"^model-index:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
_TASKS = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "text2text-generation",
    "classes": "text-classification",
    "features": "feature-extraction",
}
_CLASSIFIERS = {"ForImageClassification": "image-classification", "ForTokenClassification": "token-classification"}
_METRICS = (
    ("kl_divergence", "KL(fine-tune || this)", "kl"),
    ("recovered_kl", "recovered share of the base's KL", "recovered"),
    ("top_1_agreement", "top-1 agreement with the fine-tune", "top1"),
    ("perplexity", "perplexity", "perplexity"),
)


def with_validation(card: str, figures: Mapping[str, Any], validation: Mapping[str, Any], name: str) -> str:
    """The card with the figures of one candidate (an element of `validation.json`'s `candidates`), in place of earlier ones.

    Raises `AdaptError` for a card without the metadata block that `model_card` writes.
    """
    parts = card.split("---\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise AdaptError(f"README.md of {name}: has no metadata block between '---' lines; the figures were not added")
    metadata = _MODEL_INDEX.sub("", parts[1]) + _model_index(figures, validation, name)
    body = _SECTION.sub("", parts[2]).rstrip("\n")
    return f"---\n{metadata}---\n{body}\n\n{_section(figures, validation)}"


def failed_validation(card: str) -> bool:
    """Whether a card carries the section of a validation that failed."""
    section = _SECTION.search(card)
    return section is not None and "): fails: " in section[0]


def _model_index(figures: Mapping[str, Any], validation: Mapping[str, Any], name: str) -> str:
    settings = validation["settings"]
    of_class = (task for suffix, task in _CLASSIFIERS.items() if settings["model_class"].endswith(suffix))
    task = next(of_class, _TASKS[settings["task"]])
    lines = ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    lines += ["  - task:", f"      type: {task}", "    dataset:"]
    lines += [f"      name: {json.dumps(validation['text'])}", "      type: text", "    metrics:"]
    for kind, title, key in _METRICS:
        if figures[key] is not None:
            lines += [f"    - type: {kind}", f"      value: {figures[key]:.6g}", f"      name: {json.dumps(title)}"]
    return "\n".join(lines) + "\n"


def _section(figures: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    base, fine_tune = validation["base"], validation["fine_tune"]
    rows = [
        ("KL to the fine-tune, nats", base["kl"], 0.0 if figures["kl"] is not None else None, figures["kl"]),
        ("recovered share of it", base["recovered"], None, figures["recovered"]),
        ("top-1 agreement", base["top1"], None, figures["top1"]),
        ("perplexity", base["perplexity"], fine_tune["perplexity"], figures["perplexity"]),
    ]
    table = "\n".join(f"| {title} | {_cell(a)} | {_cell(b)} | {_cell(c)} |" for title, a, b, c in rows)
    enlarged = enlarged_line(validation)
    said = f" {enlarged}" if enlarged else ""
    verdict = "passes" if figures["passed"] else "fails: " + "; ".join(figures["reasons"])
    return f"""{_BEGIN}
## Validation

Rerun on {validation["tokens"]} tokens of `{validation["text"]}` ({validation["dtype"]}, {validation["device"]}): {verdict}.{said}

| | base | fine-tune | this adapter |
|---|---|---|---|
{table}

{_END}
"""


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
