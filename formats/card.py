"""The model card (`README.md`) of a conversion, in the Hub's metadata form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_convert.formats.location import Location
from adapt_convert.formats.profiles import IMAGE_FORMS

_LOAD = {
    "lora": "PeftModel.from_pretrained({model}, {here})",
    "diffusers": "{model}\nmodel.load_lora_weights({here})",
    "kohya": '{model}\nmodel.load_lora_weights({here}, weight_name="lora.safetensors")',
    "latte": "adapt_convert.load({model}, {here})",
    "shared-lora": (
        "adapt_convert.load({model}, {here})\n"
        "with adapt_convert.task_ids(model, [1]):  # of each row of the batch: 0 is the base, k the k-th adapter\n    ..."
    ),
    "gguf": """import xllamacpp  # or llama.cpp's own programs: --lora adapter_model.gguf

params = xllamacpp.CommonParams()
params.model.path = "the base as .gguf"
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo({here} + "/adapter_model.gguf", 1.0)]
server = xllamacpp.Server(params)
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


_TITLE = {"shared-lora": "Shared LoRA"}
_LIBRARY = {"lora": "peft", "gguf": "gguf", "diffusers": "diffusers", "kohya": "diffusers"}
_HERE = json.dumps("path/of/this/directory")
_LICENCE = ("license", "license_name", "license_link")


def base_licence(directory: Path) -> dict[str, str]:
    """The licence that a model's own card (`README.md`) declares in its metadata; empty where it declares none."""
    card = directory / "README.md"
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        metadata = metadata_load(card)
    except (ValueError, OSError, YAMLError):
        return {}  # somebody else's card, and not what was asked for
    return {name: metadata[name] for name in _LICENCE if metadata and isinstance(metadata.get(name), str)}


def published_card(card: str, repo: str) -> str:
    """The card with the repository's name where it says how to load the adapter."""
    return card.replace(_HERE, json.dumps(repo))


def model_card(report: Mapping[str, Any], config: Mapping[str, Any], base: Location) -> str:
    """Markdown with the numbers of `report`; `config` is that of the model class the adapter is for, `base` what it loads onto."""
    origin, source = base.origin, report["inputs"]["source"]["origin"]
    architecture = str((config.get("architectures") or [""])[0])
    auto = _auto_class(architecture, config)
    statuses = [row["status"] for row in report["tensors"].values()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in ("factored", "exact", "unchanged", "dropped") if s in statuses)
    profile = report.get("profile") or {}
    layout = profile.get("layout", "peft")
    layout = report["target"] if layout == "peft" else layout
    code = _loading(report, layout, auto, base)
    # The Hub takes ids alone: a local path would be refused, and is nobody's business.
    lineage = {"base_model": base.loadable, "base_model_relation": "adapter"} if base.is_hub else {}
    metadata = "".join(f"{name}: {json.dumps(value)}\n" for name, value in (lineage | base_licence(base.directory)).items())
    commit = f" (commit {base.revision})" if base.is_hub else ""
    return f"""---
{metadata}library_name: {_LIBRARY.get(layout, "adapt-convert")}
tags:
- {report["target"]}
- adapt-convert
---

# {_TITLE.get(report["target"], report["target"].upper())} of {source}

Converted from `{source}` on `{origin}`{commit} {_data(report)}.

- captured energy of the factored matrices: {_percent(report["captured_energy"])}
- captured energy of all changes: {_percent(report["captured_energy_of_all_changes"])}
- weights: {report["bytes"]} bytes
{_served(profile)}- tensors of the source: {counts}

What became of every tensor is in `conversion.json`.

```python
{code}```
"""


def _auto_class(architecture: str, config: Mapping[str, Any]) -> str:
    """The class of `transformers` that makes the model: an auto class, or the model's own where none has that head."""
    auto = next((name for suffix, name in _AUTO.items() if architecture.endswith(suffix)), None)
    if auto == "AutoModelForSeq2SeqLM" and config.get("num_mel_bins"):
        return "AutoModelForSpeechSeq2Seq"
    if auto == "AutoModelForSeq2SeqLM" and not config.get("is_encoder_decoder"):
        return "AutoModelForImageTextToText"
    # AutoModel would leave the head out, and with it the names that the adapter has. transformers has no classes of custom code.
    if auto is None and "For" in architecture and "auto_map" not in config:
        return architecture
    return auto or "AutoModel"


def _data(report: Mapping[str, Any]) -> str:
    calibration = report.get("calibration")
    return f"and fitted to {calibration['tokens']} tokens of text" if calibration else "without training data"


def _loading(report: Mapping[str, Any], layout: str, auto: str, base: Location) -> str:
    """Python that loads the adapter; tokens or classes that the fine-tune added need a larger base first."""
    path, where = Path(base.origin), json.dumps(base.loadable)
    if layout == "gguf":
        return _LOAD[layout].format(here=_HERE)
    if layout in IMAGE_FORMS:
        load = _LOAD[layout].format(model=f"DiffusionPipeline.from_pretrained({where})", here=_HERE)
        return f"from diffusers import DiffusionPipeline\n\nmodel = {load}\n"
    imported = "from peft import PeftModel" if layout == "lora" else "import adapt_convert"
    if path.suffix == ".gguf":
        where = f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"
    if "classes" in report:
        where += f", num_labels={report['classes']}, ignore_mismatched_sizes=True"
    model, resize = f"{auto}.from_pretrained({where})", ""
    if "vocabulary" in report:
        resize = f"base = {model}\nbase.resize_token_embeddings({report['vocabulary']})  # the fine-tune added tokens\n"
        model = "base"
    load = _LOAD.get(layout, _LOAD["latte"]).format(model=model, here=_HERE)
    return f"{imported}\nfrom transformers import {auto}\n\n{resize}model = {load}\n"


def _served(profile: Mapping[str, Any]) -> str:
    """One line on the consumer that an adapter was made for."""
    if not profile:
        return ""
    started = f", started with `{profile['serve']}`" if profile["serve"] else ""
    return f"- for {profile['consumer']}{started}; {profile['left_out_energy']:.4%} of the change is left out for it\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.4%}"
