"""Renaming between kohya, PEFT and diffusers to the bit, the written bytes, module names, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adapt_convert
from adapt_convert.convert import lora as lora_solver
from adapt_convert.convert.opening import open_pair
from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.diffusion import spellings
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.image_lora import ImageLora
from adapt_convert.formats.location import locate
from adapt_convert.formats.peft import LoraAdapter, LowRankDelta

LINEAR, CONVOLUTION = "down_blocks.0.attentions.0.to_q", "mid_block.resnets.0.conv1"
FILES = {"peft": "adapter_model.safetensors", "diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}


def make_base(directory: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    """What looks like a UNet of two modules."""
    directory.mkdir()
    shapes = shapes or {f"{LINEAR}.weight": (6, 8), f"{CONVOLUTION}.weight": (5, 4, 3, 3), f"{CONVOLUTION}.bias": (5,)}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "layers_per_block": 1}')
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "unet")


def kohya(rank: int = 2, alpha: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    names = {"lora_unet_down_blocks_0_attentions_0_to_q": False, "lora_unet_mid_block_resnets_0_conv1": True}
    state = {}
    for name, conv in names.items():
        state[f"{name}.lora_down.weight"] = draw(rank, 4, 3, 3) if conv else draw(rank, 8)
        state[f"{name}.lora_up.weight"] = draw(5, rank, 1, 1) if conv else draw(6, rank)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("factors were factored again")

    monkeypatch.setattr(lora_solver, "factorise", refuse)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"rank": 64}])
def test_factors_go_from_form_to_form_to_the_bit_and_without_svd(base, tmp_path: Path, monkeypatch, options: dict[str, Any]) -> None:
    no_svd(monkeypatch)
    first = kohya(alpha=2.0)
    source = write(tmp_path / "first.safetensors", first)
    for number, form in enumerate(("peft", "diffusers", "peft", "kohya", "diffusers", "kohya")):
        source = adapt_convert.convert(base, source, profile=form, **options).save(tmp_path / f"{number}-{form}")
    last = load_file(source / FILES["kohya"])
    assert last.keys() == first.keys()
    for name, tensor in first.items():
        assert torch.equal(last[name], tensor), name


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5),
    power=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    forms=st.lists(st.sampled_from(list(FILES)), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_round_trips(tmp_path_factory, base, rank: int, power: int, dtype: torch.dtype, forms: list[str], seed: int) -> None:
    """Through any forms, and with any alpha whose scale no dtype has to round, factors and scale are what they were."""
    directory = tmp_path_factory.mktemp("trip")
    first = kohya(rank, rank * 2.0**power, dtype, seed)
    source = write(directory / "first.safetensors", first)
    for number, form in enumerate([*forms, "kohya"]):
        source = adapt_convert.convert(base, source, profile=form).save(directory / str(number))
    last = load_file(source / FILES["kohya"])
    for name, tensor in first.items():
        if name.endswith(".alpha"):
            assert last[name] == rank
        else:
            expected = tensor * 2.0**power if name.endswith("lora_up.weight") else tensor
            assert last[name].dtype == dtype
            assert torch.equal(last[name], expected), name


def test_an_adapter_of_low_rank_is_never_clamped(base, tmp_path: Path) -> None:
    """Rank 2 stored at rank 4, most of its energy in the first direction: a clamp at 99 % of it would leave the second out."""
    state = kohya(4, 4.0)
    for name, tensor in state.items():
        if name.endswith("lora_up.weight"):
            tensor[:, 1] *= 0.05
            tensor[:, 2:] = 0
    source = write(tmp_path / "padded.safetensors", state)
    report = adapt_convert.convert(base, source, rank=4).report
    assert report["captured_energy"] == 1.0
    assert {row["rank"] for row in report["tensors"].values() if row["status"] == "factored"} == {4}
    assert adapt_convert.convert(base, source, rank=2).report["captured_energy"] > 1 - 1e-9


def test_a_smaller_rank_is_the_truncated_svd(base, tmp_path: Path) -> None:
    state = kohya(4, 2.0)
    report = adapt_convert.convert(base, write(tmp_path / "a.safetensors", state), rank=1).report
    for module, name in {LINEAR: "down_blocks_0_attentions_0_to_q", CONVOLUTION: "mid_block_resnets_0_conv1"}.items():
        up, down = (state[f"lora_unet_{name}.lora_{half}.weight"].flatten(1).double() for half in ("up", "down"))
        values = torch.linalg.svdvals(up @ down / 2)
        expected = float(values[0] ** 2 / values.square().sum())
        assert report["tensors"][f"{module}.weight"]["captured_energy"] == pytest.approx(expected, rel=1e-5)


# What is written, to the byte.

GOLDEN = {
    "peft": "fc9fc08f1f22d3fc83e6d8a02683d2599a84610c484f061d871d9a6cebde85d8",
    "diffusers": "556ef7c9c7ad9cabc0a34ffd9875d85e05f52e3212aad703db534cb051848b2a",
    "kohya": "58676977fef2bde166bf205b579deec2e6b23e296c5fbe1895a0e5bba1c7c346",
}


def golden_adapter() -> LoraAdapter:
    factors = {
        LINEAR: LowRankDelta(torch.arange(12.0).reshape(6, 2), torch.arange(16.0).reshape(2, 8)),
        CONVOLUTION: LowRankDelta(torch.arange(10.0).reshape(5, 2) / 4, torch.arange(72.0).reshape(2, 36) / 8),
    }
    return LoraAdapter(factors, kernels={CONVOLUTION: (4, 3, 3)}, all_modules=list(factors), base_model="unet")


@pytest.mark.parametrize("form", FILES)
def test_golden_bytes(base, tmp_path: Path, form: str) -> None:
    adapter: Any = golden_adapter()
    if form == "diffusers":
        adapter = ImageLora(adapter, {module: f"unet.{module}" for module in adapter.factors}, "diffusers")
    elif form == "kohya":
        adapter = ImageLora(adapter, {module: f"lora_unet_{module.replace('.', '_')}" for module in adapter.factors}, "kohya")
    size = adapter.write(tmp_path)
    written = (tmp_path / FILES[form]).read_bytes()
    assert len(written) == size
    assert hashlib.sha256(written).hexdigest() == GOLDEN[form]
    save_file({n: t.contiguous() for n, t in adapter.tensors().items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert written == (tmp_path / "theirs.safetensors").read_bytes()


# Names.

SPELLINGS = {
    "diffusers": (f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"),
    "the component's own": (f"{LINEAR}.lora_A.weight", f"{LINEAR}.lora_B.weight"),
    "ComfyUI": (f"diffusion_model.{LINEAR}.lora_down.weight", f"diffusion_model.{LINEAR}.lora_up.weight"),
    "kohya": ("lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight", "lora_unet_down_blocks_0_attentions_0_to_q.lora_up.weight"),
    "LyCORIS": ("lycoris_down_blocks_0_attentions_0_to_q.lora_down.weight", "lycoris_down_blocks_0_attentions_0_to_q.lora_up.weight"),
    "diffusers before PEFT": (f"unet.{LINEAR}.lora.down.weight", f"unet.{LINEAR}.lora.up.weight"),
    "attention processors": (
        "unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight",
        "unet.down_blocks.0.attentions.0.processor.to_q_lora.up.weight",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(base, tmp_path: Path, name: str) -> None:
    down, up = SPELLINGS[name]
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    _, source = open_pair(base, write(tmp_path / "a.safetensors", {down: a, up: b}))
    assert list(source.parts) == [f"{LINEAR}.weight"]
    torch.testing.assert_close(source.parts[f"{LINEAR}.weight"].load().dense(), b @ a)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "a_b", "to_q", "0", "1"]), min_size=1, max_size=4), min_size=1, max_size=12))
def test_a_spelling_never_names_another_module(paths: list[list[str]]) -> None:
    class Base:
        is_pipeline, is_diffusion, config = False, True, {"_class_name": "UNet2DConditionModel"}

    names = {".".join(path) for path in paths}
    found = spellings(Base(), names)  # type: ignore[arg-type]
    for name in names:
        for spelling in (f"lora_unet_{name.replace('.', '_')}", f"lycoris_{name.replace('.', '_')}", f"unet.{name}"):
            assert name in found[spelling]
            alike = {other for other in names if other.replace(".", "_") == name.replace(".", "_")}
            assert set(found[spelling]) == ({name} if spelling.startswith("unet.") else alike)


def test_diffusers_metadata_gives_the_scale(base, tmp_path: Path) -> None:
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    notes = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 3}, "unet.use_rslora": True}
    state = {f"unet.{LINEAR}.lora_A.weight": a, f"unet.{LINEAR}.lora_B.weight": b}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(notes)})
    _, source = open_pair(base, tmp_path / "a.safetensors")
    torch.testing.assert_close(source.parts[f"{LINEAR}.weight"].load().dense(), b @ a * 3 / math.sqrt(2))


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}'])
def test_metadata_that_is_none(base, tmp_path: Path, text: str) -> None:
    state = {f"unet.{LINEAR}.lora_A.weight": torch.ones(2, 8), f"unet.{LINEAR}.lora_B.weight": torch.ones(6, 2)}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(AdaptError, match=r"no JSON object|alpha_pattern"):
        open_pair(base, tmp_path / "a.safetensors")


def test_names_after_the_original_unet_are_diffusers_own_mapping(tmp_path: Path) -> None:
    """As kohya's scripts name SDXL: what diffusers fuses from such a file is what we merge."""
    import copy

    from image_models import UNET, UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET).eval()
    model.save_pretrained(tmp_path / "unet")
    modules = {
        "input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    }
    state, weights = {}, dict(model.named_parameters())
    for name, path in modules.items():
        shape = weights[f"{path}.weight"].shape
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, *shape[1:])
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    source = write(tmp_path / "sdxl.safetensors", state)
    adapt_convert.merge(tmp_path / "unet", source, tmp_path / "merged")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name, value in merged.items() if not torch.equal(value, weights[name])}
    assert changed == {f"{path}.weight" for path in modules.values()}

    from diffusers import StableDiffusionPipeline

    theirs = copy.deepcopy(model)
    loaded, alphas = StableDiffusionPipeline.lora_state_dict(state, unet_config=model.config)
    theirs.load_lora_adapter(loaded, prefix="unet", network_alphas=alphas)
    theirs.fuse_lora()
    for path in modules.values():
        torch.testing.assert_close(merged[f"{path}.weight"], theirs.get_submodule(path).base_layer.weight, atol=1e-5, rtol=1e-5)


# Refusals.

Q = "lora_unet_down_blocks_0_attentions_0_to_q"


def changed(**changes: Any) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            state[f"{Q}.{name.replace('__', '.')}"] = value

    return change


def only_loha(a: tuple[int, int], b: tuple[int, int]) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        state.clear()
        for number in (1, 2):
            state[f"{Q}.hada_w{number}_a"], state[f"{Q}.hada_w{number}_b"] = torch.ones(a), torch.ones(b)

    return change


ABS = (("A", "down"), ("B", "up"))
REFUSED: dict[str, tuple[Any, str]] = {
    "another base": (lambda s: s.update({"lora_unet_x.lora_down.weight": torch.ones(2, 8)}), "lora_unet_x, which .* does not have"),
    "only one half": (lambda s: s.pop(f"{Q}.lora_up.weight"), "no complete set of one method"),
    "two methods": (changed(hada_w1_a=torch.ones(6, 2)), "no complete set of one method"),
    "half of a LoKr": (lambda s: (s.clear(), s.update({f"{Q}.lokr_w1": torch.ones(2, 2)})), "no complete set of one method"),
    "another width": (changed(lora_down__weight=torch.ones(2, 7)), r"down \[2, 7\], up \[6, 2\], and .* is \[6, 8\]"),
    "ranks differ": (changed(lora_down__weight=torch.ones(3, 8)), "down .* up"),
    "alpha zero": (changed(alpha=torch.tensor(0.0)), "alpha is 0, expected one positive number"),
    "alpha NaN": (changed(alpha=torch.tensor(math.nan)), "alpha is nan"),
    "two alphas": (changed(alpha=torch.ones(2)), "alpha is nan, expected one positive number"),
    "integers": (changed(lora_down__weight=torch.ones(2, 8, dtype=torch.int32)), "stored as I32"),
    "not finite": (changed(lora_down__weight=torch.full((2, 8), math.inf)), "not finite"),
    "twice": (lambda s: s.update({f"unet.{LINEAR}.lora_{x}.weight": s[f"{Q}.lora_{y}.weight"].clone() for x, y in ABS}), "already"),
    "the same tensor twice": (changed(lora_A__weight=torch.ones(2, 8)), "which are the same tensor"),
    "OFT": (changed(oft_blocks=torch.ones(2, 4, 4)), "of a method that is not supported"),
    "a stranger": (changed(something=torch.ones(2)), "which is no tensor"),
    "a bias of nothing": (changed(diff_b=torch.ones(6)), "has no bias in"),
    "a LoHa of another shape": (only_loha((6, 2), (2, 9)), r"a change of \[6, 9\]"),
    "a LoHa that does not multiply": (only_loha((6, 2), (3, 8)), r"w1_a \[6, 2\], w1_b \[3, 8\]"),
    "a magnitude of another shape": (changed(dora_scale=torch.ones(3, 1)), "a magnitude of"),
    "all zero": (lambda s: [tensor.zero_() for tensor in s.values()], "no tensor changed|nothing to convert"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(base, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    state = kohya()
    change(state)
    with pytest.raises(AdaptError, match=message):
        adapt_convert.convert(base, write(tmp_path / "a.safetensors", state)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ambiguous_spelling_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "unet", {"a_b.c.weight": (6, 8), "a.b_c.weight": (6, 8)})
    state = {"lora_unet_a_b_c.lora_down.weight": torch.ones(2, 8), "lora_unet_a_b_c.lora_up.weight": torch.ones(6, 2)}
    with pytest.raises(AdaptError, match=r"may be .* or .*; there is no telling which"):
        adapt_convert.convert(base, write(tmp_path / "a.safetensors", state))


def test_forms_that_do_not_fit_the_base(pairs, base, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", kohya())
    with pytest.raises(AdaptError, match="--for nothing"):
        adapt_convert.convert(base, source, profile="nothing")
    with pytest.raises(AdaptError, match="no diffusion model"):
        adapt_convert.convert(pairs("llama").base, pairs("llama").ft, profile="kohya")


def test_parts_of_a_single_file(tmp_path: Path) -> None:
    shapes = {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (6, 8),
        "model.diffusion_model.middle_block.0.in_layers.2.weight": (5, 4, 3, 3),
        "model.diffusion_model.out.0.weight": (5,),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (6, 5),
        "first_stage_model.decoder.conv_in.weight": (3, 4, 3, 3),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (6, 5),
    }
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    ft = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    conversion = adapt_convert.convert(write(tmp_path / "base.safetensors", base), write(tmp_path / "ft.safetensors", ft), rank=9)
    written = load_file(conversion.save(tmp_path / "out") / "lora.safetensors")
    assert {name.partition(".")[0] for name in written} == {
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_mid_block_resnets_0_conv1",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    }
    rows = conversion.report["tensors"]
    dropped = {name.split(".")[1] for name, row in rows.items() if row["status"] == "dropped"}
    assert dropped == {"decoder", "diffusion_model", "model"}  # the VAE, a norm, OpenCLIP
    adapt_convert.merge(tmp_path / "base.safetensors", tmp_path / "out" / "lora.safetensors", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, row in rows.items():
        torch.testing.assert_close(merged[name], ft[name] if row["status"] == "factored" else base[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(AdaptError, match="--for kohya keeps them"):
        adapt_convert.convert(tmp_path / "base.safetensors", tmp_path / "ft.safetensors", profile="diffusers")


def test_a_pipeline_index_that_leads_elsewhere_is_not_followed(base, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"..": ["diffusers", "X"], "../base": ["diffusers", "X"], "_x": 1}))
    with pytest.raises(AdaptError, match="no tensors"):
        Checkpoint(locate(tmp_path / "pipe"))


def test_from_the_command_line(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose ranks stay what they are is named so; the card loads it; inspect and push know the file."""
    from click.testing import CliRunner

    from adapt_convert.cli import main

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "style.safetensors", kohya(5, 5.0))

    def run(*words: str) -> str:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return result.output

    assert "written to style-lora-peft" in run("delta", str(base), "style.safetensors", "--for", "peft")
    assert "written to style-lora-r3" in run("delta", str(base), "style.safetensors", "--rank", "3")
    assert 'load_lora_weights("path/of/this/directory")' in (tmp_path / "style-lora-r3" / "README.md").read_text()
    assert json.loads((tmp_path / "style-lora-r3" / "conversion.json").read_text())["profile"]["layout"] == "diffusers"
    assert "LoRA file" in run("inspect", "style.safetensors")
    assert "pytorch_lora_weights.safetensors" in run("push", "style-lora-r3", "org/style", "--dry-run")

    refused = CliRunner().invoke(main, ["delta", str(base), "style.safetensors", "-o", "never", "--validate"])
    assert refused.exit_code == 1
    assert "is a diffusion model, which the validator does not run" in refused.stderr
    assert not (tmp_path / "never").exists()
    (job,) = adapt_convert.batch({"jobs": [{"base": str(base), "source": "style.safetensors", "validate": True}]}, "many")["jobs"]
    assert "is a diffusion model, which the validator does not run" in job["error"]
    assert not (tmp_path / "many" / "style-lora-r16").exists()  # refused before it was converted
