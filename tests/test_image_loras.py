"""LoRA files of the image world: made by lycoris-lora and diffusers, and what is written loaded by diffusers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_server import Hub
from image_models import UNET, FluxTransformer2DModel, UNet2DConditionModel, image, load_pipeline, pipeline_base
from lycoris import LycorisNetwork, create_lycoris
from lycoris.logging import logger as lycoris_logger
from safetensors.torch import load_file

import adapt_convert
from adapt_convert.formats.errors import AdaptError

FULL = 1000  # above every dimension of the tiny models
lycoris_logger.setLevel("ERROR")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline and its fine-tune, in which every matrix and convolution of UNet and text encoder has changed."""
    directory = tmp_path_factory.mktemp("pipelines")
    base = pipeline_base(directory / "base")
    pipe = load_pipeline(base)
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding.weight" not in name:
                parameter.data += 0.03 * torch.randn_like(parameter)
    pipe.save_pretrained(directory / "ft")
    return base, directory / "ft"


@pytest.fixture(scope="module")
def pipeline_lora(pipelines, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The fine-tune as a LoRA of rank 4, in the form of that name."""
    made: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in made:
            conversion = adapt_convert.convert(*pipelines, rank=4, profile=form)
            made[form] = conversion.save(tmp_path_factory.mktemp("lora") / form)
        return made[form]

    return make


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_pipeline_at_full_rank_paints_what_the_fine_tune_paints(pipelines, tmp_path: Path, form: str) -> None:
    base, ft = pipelines
    conversion = adapt_convert.convert(base, ft, rank=FULL, profile=form)
    assert conversion.report["captured_energy_of_all_changes"] > 1 - 1e-6
    out = conversion.save(tmp_path / "lora")
    expected, before = image(load_pipeline(ft)), image(load_pipeline(base))
    assert (expected - before).abs().max() > 0.5
    pipe = load_pipeline(base)
    pipe.load_lora_weights(out, weight_name="lora.safetensors" if form == "kohya" else None)
    torch.testing.assert_close(image(pipe), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_paints_what_its_merge_paints(pipelines, pipeline_lora, tmp_path: Path, form: str) -> None:
    base, _ = pipelines
    lora = pipeline_lora(form)
    adapt_convert.merge(base, lora, tmp_path / "merged")
    pipe = load_pipeline(base)
    pipe.load_lora_weights(lora, weight_name="lora.safetensors" if form == "kohya" else None)
    torch.testing.assert_close(image(pipe), image(load_pipeline(tmp_path / "merged")), atol=1e-3, rtol=1e-3)


def test_what_a_lora_file_has_no_place_for_is_said(pipelines, tmp_path: Path) -> None:
    base, ft = pipelines
    pipe = load_pipeline(ft)
    pipe.unet.conv_norm_out.weight.data += 0.1
    pipe.vae.decoder.conv_in.weight.data += 0.1
    pipe.text_encoder.get_input_embeddings().weight.data += 0.1
    pipe.save_pretrained(tmp_path / "ft")
    report = adapt_convert.convert(base, tmp_path / "ft", rank=2).report
    dropped = {name: row["reason"] for name, row in report["tensors"].items() if row["status"] == "dropped" and row["energy"]}
    assert len(dropped) == 3
    assert "no names for this part" in dropped["vae.decoder.conv_in.weight"]
    assert "factors of matrices and convolutions alone" in dropped["unet.conv_norm_out.weight"]
    with pytest.raises(AdaptError, match="--strict"):
        adapt_convert.convert(base, tmp_path / "ft", rank=2, strict=True)


def test_a_pipeline_of_the_hub(pipelines, pipeline_lora, tmp_path: Path) -> None:
    base, _ = pipelines
    names = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]
    with Hub() as hub:
        hub.add("org/pipe", {name: (base / name).read_bytes() for name in names} | {"unet/diffusion_pytorch_model.bin": b"not needed"})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        code = "from adapt_convert.cli import main; main()"
        words = ["delta", "org/pipe", str(pipeline_lora("kohya")), "--for", "diffusers", "-o", "out"]
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(path / "pytorch_lora_weights.safetensors") for path in (tmp_path / "out", pipeline_lora("diffusers")))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert 'from_pretrained("org/pipe")' in (tmp_path / "out" / "README.md").read_text()


def test_a_transformer_component(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    base = FluxTransformer2DModel(**sizes, in_channels=4, joint_attention_dim=16, pooled_projection_dim=16)
    ft = copy.deepcopy(base)
    for parameter in ft.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.03 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "base")
    ft.save_pretrained(tmp_path / "ft")
    out = adapt_convert.convert(tmp_path / "base", tmp_path / "ft", rank=FULL).save(tmp_path / "out")
    base.load_lora_adapter(load_file(out / "pytorch_lora_weights.safetensors"), prefix="transformer")
    base.fuse_lora()
    for name, parameter in ft.named_parameters():
        if parameter.ndim > 1:
            weight = base.get_submodule(name.removesuffix(".weight")).base_layer.weight
            torch.testing.assert_close(weight, parameter, atol=1e-5, rtol=1e-5)


# LyCORIS, on the UNet alone.

METHODS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "lora"},
    "LoCon, Tucker": {"algo": "lora", "use_tucker": True},
    "LoCon, rsLoRA": {"algo": "lora", "rs_lora": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both decomposed": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 2, "conv_dim": 1},
    "LoKr, Tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "LoKr, whole matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "DoRA by rows": {"algo": "lora", "dora_wd": True},
    "DoRA by columns": {"algo": "lora", "dora_wd": True, "wd_on_out": False},
    "DoRA of LoHa": {"algo": "loha", "dora_wd": True},
}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET).eval()
    directory = tmp_path_factory.mktemp("models") / "unet"
    model.save_pretrained(directory)
    return directory, model


def make_lycoris(model: Any, path: Path, **options: Any) -> Any:
    """A network around a copy of the model that has moved from its start, saved to `path`."""
    torch.manual_seed(0)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"]})
    network = create_lycoris(copy.deepcopy(model), 1.0, **{"linear_dim": 4, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 1} | options)
    network.apply_to()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_weights(str(path), torch.float32, {})
    return network


@torch.no_grad()
def output_of(layer: Any, weight: torch.Tensor | None) -> torch.Tensor:
    """What a LyCORIS layer makes of fixed inputs, or its plain module with another `weight`.

    Not `get_merged_weight`: in lycoris-lora 4.1.3 that multiplies by the scale twice for LoHa and LoKr, unlike the layer itself.
    """
    module = layer.org_module[0]
    is_matrix = module.weight.ndim == 2
    x = torch.randn(3, module.in_features) if is_matrix else torch.randn(1, module.in_channels, 6, 6)
    torch.manual_seed(1)
    if weight is None:
        return layer(x)
    if is_matrix:
        return torch.nn.functional.linear(x, weight, module.bias)
    return torch.nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)


@pytest.mark.parametrize("name", METHODS)
def test_lycoris(unet, tmp_path: Path, name: str) -> None:
    base, model = unet
    network = make_lycoris(model, tmp_path / "lycoris.safetensors", **METHODS[name])
    adapt_convert.merge(base, tmp_path / "lycoris.safetensors", tmp_path / "merged")
    merged, before = UNet2DConditionModel.from_pretrained(tmp_path / "merged").state_dict(), model.state_dict()
    by_name = {layer.lora_name: layer for layer in network.loras}
    changed = {key for key, value in merged.items() if not torch.equal(value, before[key])}
    assert {f"lycoris_{key.removesuffix('.weight').replace('.', '_')}" for key in changed} == set(by_name)
    for key in changed:
        layer = by_name[f"lycoris_{key.removesuffix('.weight').replace('.', '_')}"]
        torch.manual_seed(0)
        expected = output_of(layer, None)
        torch.manual_seed(0)
        torch.testing.assert_close(
            output_of(layer, merged[key]), expected, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )

    conversion = adapt_convert.convert(base, tmp_path / "lycoris.safetensors", rank=FULL)
    assert conversion.report["captured_energy_of_all_changes"] > 1 - 1e-6
    assert ("captured_energy_without_magnitude" in conversion.report) == name.startswith("DoRA")
    live = copy.deepcopy(model)
    live.load_lora_adapter(load_file(conversion.save(tmp_path / "out") / "pytorch_lora_weights.safetensors"), prefix="unet")
    live.fuse_lora()
    for key in changed:
        weight = live.get_submodule(key.removesuffix(".weight")).base_layer.weight
        torch.testing.assert_close(weight, merged[key], atol=2e-5, rtol=1e-5)


def test_peft_loads_what_is_written_for_it(unet, tmp_path: Path) -> None:
    """Convolutions in PEFT's layout, written and read back."""
    base, model = unet
    make_lycoris(model, tmp_path / "lycoris.safetensors")
    out = adapt_convert.convert(base, tmp_path / "lycoris.safetensors", profile="peft").save(tmp_path / "peft")
    live = peft.PeftModel.from_pretrained(copy.deepcopy(model), out).merge_and_unload().state_dict()
    for name, adapter in {"file": tmp_path / "lycoris.safetensors", "peft": out}.items():
        adapt_convert.merge(base, adapter, tmp_path / f"merged-{name}")
        merged = UNet2DConditionModel.from_pretrained(tmp_path / f"merged-{name}").state_dict()
        for key, value in live.items():
            torch.testing.assert_close(merged[key], value, atol=1e-6, rtol=1e-6)
