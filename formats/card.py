"""The model card (`README.md`) of a conversion, in the Hub's metadata form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_LOAD = {
    "lora": """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base}), "path/of/this/directory")
""",
    "latte": """import adapt_convert
from transformers import {auto}

model = adapt_convert.load({auto}.from_pretrained({base}), "path/of/this/directory")
""",
    "lorta": """import adapt_convert
from transformers import {auto}

model = adapt_convert.load({auto}.from_pretrained({base}), "path/of/this/directory")
""",
}
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def model_card(report: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Markdown with the numbers of `report`; `config` is that of the model class the adapter is for."""
    base, source = report["inputs"]["base"]["origin"], report["inputs"]["source"]["origin"]
    architecture = str((config.get("architectures") or [""])[0])
    auto = next((name for suffix, name in _AUTO.items() if architecture.endswith(suffix)), "AutoModel")
    statuses = [row["status"] for row in report["tensors"].values()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("factored", "exact", "unchanged", "dropped") if s in statuses)
    code = _LOAD[report["target"]].format(auto=auto, base=json.dumps(base))
    # The Hub takes ids alone: a local path would be refused, and is nobody's business.
    on_hub = report["inputs"]["base"]["revision"] is not None
    lineage = f"base_model: {json.dumps(base)}\nbase_model_relation: adapter\n" if on_hub else ""
    return f"""---
{lineage}library_name: {"peft" if report["target"] == "lora" else "adapt-convert"}
tags:
- {report["target"]}
- adapt-convert
---

# {report["target"].upper()} of {source}

Converted from `{source}` on `{base}` without training data.

- captured energy of the factored matrices: {_percent(report["captured_energy"])}
- captured energy of all changes: {_percent(report["captured_energy_of_all_changes"])}
- weights: {report["bytes"]} bytes
- tensors of the source: {counts}

What became of every tensor is in `conversion.json`.

```python
{code}```
"""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.4%}"
