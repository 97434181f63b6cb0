"""Models of images that are not listed: their checkpoints keep older names, which transformers changes when it loads them."""

from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Pair

import adapt_convert
from adapt_convert.convert import loading
from adapt_convert.convert.families import BY_MODEL_TYPE

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
_STAGES = {"depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
_STAGES |= {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "DeiTForImageClassification": _SIZES,
    "Dinov2ForImageClassification": _SIZES,
    "SegformerForImageClassification": _STAGES,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_full_rank_is_the_fine_tune_under_the_names_in_memory(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**CONFIGS[name])).eval()
    assert model.config.model_type not in BY_MODEL_TYPE
    model.save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "ft")
    pair = Pair(tmp_path / "base", tmp_path / "ft", model_class, {"pixel_values": torch.randn(2, 3, 16, 16)})
    out = adapt_convert.convert(pair.base, pair.ft, rank=1000).save(tmp_path / "out")
    rows = json.loads((out / "conversion.json").read_text())["tensors"]
    assert {row["status"] for row in rows.values()} == {"factored", "exact"}
    assert any(row["source_tensors"] != [module] for module, row in rows.items())  # older names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pair.logits(pair.load_peft(out))
    torch.testing.assert_close(found, pair.logits(model), atol=1e-4, rtol=1e-4)


def test_a_model_is_asked_once_whatever_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 21,000 classes takes longer to compare than all else, and this is asked for every tensor."""
    built: list[str] = []
    monkeypatch.setattr(loading, "_without_weights", lambda config: built.append(json.dumps(config)))
    loading._conversions.cache_clear()
    for count in (2, 3):
        labels = {str(number): f"class {number}" for number in range(count)}
        config = {"model_type": "deit", "id2label": labels, "label2id": {name: int(number) for number, name in labels.items()}}
        assert loading.loaded_name("classifier.weight", config) == "classifier.weight"
    loading._conversions.cache_clear()
    assert len(built) == 1
    assert "class 0" not in built[0]


def test_a_backbone_elsewhere_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` looks it up on the Hub, whatever the path of the model itself."""
    asked: list[str] = []

    def refuse(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    detr = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "use_timm_backbone": False, "backbone": "org/resnet"}
    assert loading.loaded_name("class_labels_classifier.weight", detr) == "class_labels_classifier.weight"
    assert asked == []
