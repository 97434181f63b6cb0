"""LatTE, the residual-stream construction: deltas planted in a common subspace run exactly, on stock models and their own generate()."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

import adapt_convert
from adapt_convert.convert.conversion import convert
from adapt_convert.convert.latte.layout import LAYOUTS

_TEXT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZE = _TEXT | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GQA = _SIZE | {"intermediate_size": 48, "num_key_value_heads": 2}
_OPT = _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0}
RANK = 6

CASES: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_GQA, attention_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**_GQA)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_GQA, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_GQA, head_dim=8)),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**_GQA, no_rope_layers=[1, 1, 0])),
    "gemma": (GemmaForCausalLM, GemmaConfig(**_GQA, head_dim=8)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**_GQA)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**_TEXT, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "opt": (OPTForCausalLM, OPTConfig(**_OPT)),
}
_ENCODER = _SIZE | {"intermediate_size": 48, "max_position_embeddings": 64}
ENCODERS: dict[str, tuple[type, Any]] = {
    "bert": (BertForMaskedLM, BertConfig(**_ENCODER)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**_ENCODER)),
    "xlm-roberta": (XLMRobertaForMaskedLM, XLMRobertaConfig(**_ENCODER)),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64, pad_token_id=0),
    ),
}

VISION: dict[str, tuple[type, Any]] = {
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8, num_labels=3
        ),
    )
}


@dataclass(frozen=True)
class Planted:
    """A base and fine-tunes of it whose effective deltas all lie in the span of `Q (d, RANK)`."""

    directory: Path
    model_class: type
    Q: torch.Tensor

    def model(self, name: str = "base", **kwargs: Any) -> Any:
        return self.model_class.from_pretrained(self.directory / name, **kwargs).eval()  # type: ignore[attr-defined]


def plant(model: Any, Q: torch.Tensor, seed: int = 1) -> None:
    """Change every matrix within span(Q), every norm gain, and every bias of `model`, in place, by the definition of `D_eff`."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS[model.config.model_type]
    offset = 1.0 if layout.norm == "gemma" else 0.0

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    for number in range(model.config.num_hidden_layers):
        block = model.get_submodule(layout.block.format(number))
        for norm_name, readers in layout.readers.items():
            old = new = torch.ones(len(Q))
            if norm_name:  # else nothing stands between the stream and its readers
                norm = block.get_submodule(norm_name)
                old = norm.weight.data + offset
                new = old * (1 + 2 * draw(len(old)))
                norm.weight.data = new - offset
                if getattr(norm, "bias", None) is not None:
                    norm.bias.data += draw(len(old))
            for reader in map(block.get_submodule, readers):
                weight = reader.weight.data.T if layout.conv1d else reader.weight.data
                changed = (weight * old + draw(len(weight), Q.shape[1]) @ Q.T) / new
                reader.weight.data = changed.T.contiguous() if layout.conv1d else changed
                if reader.bias is not None:
                    reader.bias.data += draw(len(reader.bias))
        for writer in map(block.get_submodule, layout.writers):
            delta = Q @ draw(Q.shape[1], writer.weight.shape[0 if layout.conv1d else 1])
            writer.weight.data += delta.T if layout.conv1d else delta
            if writer.bias is not None:
                writer.bias.data += draw(len(writer.bias))
        for extra in ("self_attn.q_norm", "self_attn.k_norm"):
            if model.config.model_type == "qwen3":
                block.get_submodule(extra).weight.data += draw(8)
        for norm_name in layout.post_norms:
            for parameter in block.get_submodule(norm_name).parameters():
                parameter.data += draw(len(parameter))
    if layout.final_norm:
        for parameter in model.get_submodule(layout.final_norm).parameters():
            parameter.data += draw(len(parameter))


def make_basis(d: int, rank: int, centred: bool, seed: int = 7) -> torch.Tensor:
    start = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(start - start.mean(0) if centred else start).Q


def save_planted(directory: Path, name: str, tasks: int = 1, rank: int = RANK, **overrides: Any) -> Planted:
    model_class, config = (CASES | ENCODERS | VISION)[name]
    config = type(config)(**{**config.to_diff_dict(), **overrides})
    torch.manual_seed(0)
    base = model_class(config).eval()
    for parameter in base.parameters():  # biases and norm gains start as zeros and ones: make them count
        parameter.data += 0.05 * torch.randn_like(parameter)
    base.save_pretrained(directory / "base")
    layout = LAYOUTS[config.model_type]
    centred = layout.norm == "layer" and not layout.post_norms
    planted = Planted(directory, model_class, make_basis(config.hidden_size, rank, centred))
    for task in range(1, tasks + 1):
        tuned = planted.model()
        plant(tuned, planted.Q, seed=task)
        tuned.save_pretrained(directory / f"ft{task}")
    return planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planted]:
    made: dict[str, Planted] = {}

    def make(name: str) -> Planted:
        if name not in made:
            made[name] = save_planted(tmp_path_factory.mktemp(name), name)
            convert(made[name].directory / "base", made[name].directory / "ft1", to="latte", rank=RANK).save(made[name].directory / "latte")
        return made[name]

    return make


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (rows, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0  # left padding
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the real tokens only: those of padding are nobody's business."""
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out[inputs["attention_mask"].bool()].float()


@pytest.mark.parametrize("name", CASES)
def test_planted_deltas_run_exactly_on_prefill_and_decoding(name: str, planted: Callable[[str], Planted]) -> None:
    case, inputs = planted(name), batch()
    base, tuned = case.model(), case.model("ft1")
    expected = logits(tuned, inputs)
    assert (logits(base, inputs) - expected).abs().max() > 0.1  # the fine-tune is another model
    adapt_convert.load(base, case.directory / "latte")
    torch.testing.assert_close(logits(base, inputs), expected, atol=1e-4, rtol=0)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = base.generate(**inputs, **options), tuned.generate(**inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_post_norm_encoders_run_exactly_with_a_basis_for_each_layer(name: str, planted: Callable[[str], Planted]) -> None:
    """Every layer has a basis of its own, the hidden states behind the last one are the fine-tune's."""
    case, inputs = planted(name), batch()
    base, tuned = case.model(), case.model("ft1")
    expected = logits(tuned, inputs)
    assert (logits(base, inputs) - expected).abs().max() > 0.1
    assert len(json.loads((case.directory / "latte" / "latte_config.json").read_text())["segments"]) == 3
    adapt_convert.load(base, case.directory / "latte")
    torch.testing.assert_close(logits(base, inputs), expected, atol=1e-4, rtol=0)
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, inputs), expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_a_vision_encoder_runs_exactly_and_unloads(planted: Callable[[str], Planted]) -> None:
    case = planted("vit")
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
    model, tuned = case.model(), case.model("ft1")
    with torch.no_grad():
        before, expected = model(**pixels).logits, tuned(**pixels).logits
        assert (before - expected).abs().max() > 0.1
        adapt_convert.load(model, case.directory / "latte")
        torch.testing.assert_close(model(**pixels).logits, expected, atol=1e-4, rtol=0)
        adapt_convert.unload(model)
        assert torch.equal(model(**pixels).logits, before)


@pytest.mark.parametrize("name", [*CASES, *ENCODERS])
def test_unload_restores_the_base_bit_for_bit(name: str, planted: Callable[[str], Planted]) -> None:
    case, inputs = planted(name), batch()
    model = case.model()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    parameters = dict(model.named_parameters())
    expected = logits(model, inputs)
    adapt_convert.load(model, case.directory / "latte")
    assert not torch.equal(logits(model, inputs), expected)
    adapt_convert.unload(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype and after[k].is_contiguous() for k, v in before.items())
    assert dict(model.named_modules()) == modules
    assert all(parameter is parameters[k] for k, parameter in model.named_parameters())
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("segments", [2, 3])
def test_segments_are_exact_too(segments: int, planted: Callable[[str], Planted], tmp_path: Path) -> None:
    case, inputs = planted("llama"), batch()
    conversion = convert(case.directory / "base", case.directory / "ft1", to="latte", rank=RANK, segments=segments)
    conversion.save(tmp_path / "latte")
    model = adapt_convert.load(case.model(), tmp_path / "latte")
    torch.testing.assert_close(logits(model, inputs), logits(case.model("ft1"), inputs), atol=1e-4, rtol=0)
    assert len(json.loads((tmp_path / "latte" / "latte_config.json").read_text())["segments"]) == segments


def test_a_basis_of_one_dim_less_is_not_exact_and_reported_so(planted: Callable[[str], Planted], tmp_path: Path) -> None:
    case, inputs = planted("llama"), batch()
    conversion = convert(case.directory / "base", case.directory / "ft1", to="latte", rank=RANK - 1)
    conversion.save(tmp_path / "latte")
    assert 0.5 < conversion.report["captured_energy"] < 0.999
    model = adapt_convert.load(case.model(), tmp_path / "latte")
    assert (logits(model, inputs) - logits(case.model("ft1"), inputs)).abs().max() > 1e-3


def test_captured_energy_is_that_of_the_written_blocks(planted: Callable[[str], Planted], tmp_path: Path) -> None:
    """Against dense effective deltas formed here, at a rank and dtype that lose something."""
    from safetensors.torch import load_file

    case = planted("qwen2")
    report = convert(case.directory / "base", case.directory / "ft1", to="latte", rank=3, dtype="bfloat16")
    report.save(tmp_path / "latte")
    tensors = load_file(tmp_path / "latte" / "latte.safetensors")
    old, new, Q = case.model().state_dict(), case.model("ft1").state_dict(), tensors["segment.0.Q"]
    for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.1.{name}"
        if name == "mlp.down_proj":
            delta = new[f"{module}.weight"] - old[f"{module}.weight"]
            approximation = Q @ tensors[f"1.writer.{module}"].float()
        else:
            norm = "input_layernorm" if "attn" in name else "post_attention_layernorm"
            gains = [side[f"model.layers.1.{norm}.weight"] for side in (new, old)]
            delta = new[f"{module}.weight"] * gains[0] - old[f"{module}.weight"] * gains[1]
            approximation = tensors[f"1.reader.{module}"].float() @ Q.T
        expected = 1 - float((delta - approximation).square().sum() / delta.square().sum())
        assert report.report["tensors"][f"{module}.weight"]["captured_energy"] == pytest.approx(expected, abs=1e-6)
    assert (Q.T @ Q - torch.eye(3)).abs().max() < 1e-6


def test_the_basis_is_the_best_one(planted: Callable[[str], Planted], tmp_path: Path) -> None:
    """No random rotation of the planted subspace into three dims captures more than the chosen three."""
    case = planted("llama")
    conversion = convert(case.directory / "base", case.directory / "ft1", to="latte", rank=3)
    old, new = case.model().state_dict(), case.model("ft1").state_dict()
    sides = []
    for key in old:
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            sides.append((new[key] - old[key]).T)
        elif key.endswith("_proj.weight"):
            norm = (
                key.split("self_attn")[0] + "input_layernorm.weight"
                if "attn" in key
                else key.split("mlp")[0] + "post_attention_layernorm.weight"
            )
            sides.append(new[key] * new[norm] - old[key] * old[norm])
    stacked = torch.cat(sides).double()
    best = torch.linalg.svdvals(stacked)[:3].square().sum() / stacked.square().sum()
    assert conversion.report["captured_energy"] == pytest.approx(float(best), abs=1e-6)


def test_bfloat16_stays_within_its_own_rounding(planted: Callable[[str], Planted]) -> None:
    """The expanded model is no further from the float32 fine-tune than a few times the fine-tune's own bfloat16 run."""
    case, inputs = planted("llama"), batch()
    exact = logits(case.model("ft1"), inputs)
    own = (logits(case.model("ft1", dtype=torch.bfloat16), inputs) - exact).norm()
    model = adapt_convert.load(case.model(dtype=torch.bfloat16), case.directory / "latte")
    assert (logits(model, inputs) - exact).norm() < 2.5 * own
    assert (logits(case.model(dtype=torch.bfloat16), inputs) - exact).norm() > 10 * own


def test_a_large_channel_costs_no_accuracy_in_bfloat16(tmp_path: Path) -> None:
    """Real models have channels of the residual stream a thousand times the others'; here one lies in the span of Q."""
    case = save_planted(tmp_path, "llama", attention_bias=False)
    base = case.model()
    base.model.embed_tokens.weight.data[:, 5] = 300.0
    base.save_pretrained(tmp_path / "base")
    tuned = case.model()
    plant(tuned, torch.linalg.qr(torch.cat([torch.eye(32)[:, 5:6], case.Q[:, :3]], dim=1)).Q)
    tuned.save_pretrained(tmp_path / "ft1")
    convert(tmp_path / "base", tmp_path / "ft1", to="latte", rank=4, dtype="float32").save(tmp_path / "latte")
    inputs, exact = batch(), logits(tuned, batch())
    own = (logits(case.model("ft1", dtype=torch.bfloat16), inputs) - exact).norm()
    model = adapt_convert.load(case.model(dtype=torch.bfloat16), tmp_path / "latte")
    assert (logits(model, inputs) - exact).norm() < 1.5 * own
    assert (logits(case.model(), inputs) - exact).norm() > 3 * own


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_base_that_is_a_bare_backbone_serves_both_forms_of_the_model(name: str, tmp_path: Path) -> None:
    """Its checkpoint, and so the adapter, has no prefix; one that finds no place for a block must not run without it."""
    case, inputs = save_planted(tmp_path, name), batch()
    for side in ("base", "ft1"):
        case.model(side).base_model.save_pretrained(tmp_path / f"bare-{side}")
    convert(tmp_path / "bare-base", tmp_path / "bare-ft1", to="latte", rank=RANK).save(tmp_path / "latte")
    expected = case.model("ft1").base_model(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    for model in (transformers.AutoModel.from_pretrained(tmp_path / "bare-base").eval(), case.model()):
        adapt_convert.load(model, tmp_path / "latte")
        with torch.no_grad():
            found = model.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)


def test_torch_compile_traces_the_expanded_model_whole(planted: Callable[[str], Planted]) -> None:
    case, inputs = planted("llama"), batch()
    model = adapt_convert.load(case.model(), case.directory / "latte")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, inputs), logits(case.model("ft1"), inputs), atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_embeddings_given_as_input_and_a_bare_backbone_work(planted: Callable[[str], Planted]) -> None:
    case, inputs = planted("llama"), batch()
    model = adapt_convert.load(case.model(), case.directory / "latte")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        out = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(out, logits(case.model("ft1"), inputs), atol=1e-4, rtol=0)
        bare = transformers.AutoModel.from_pretrained(case.directory / "base").eval()
        adapt_convert.load(bare, case.directory / "latte")
        expected = case.model("ft1").model(**inputs).last_hidden_state
        torch.testing.assert_close(bare(**inputs).last_hidden_state, expected, atol=1e-4, rtol=0)


def test_changed_embeddings_and_head_are_stored_exactly(tmp_path: Path) -> None:
    case, inputs = save_planted(tmp_path, "llama"), batch()
    tuned = case.model("ft1")
    tuned.lm_head.weight.data += 0.1
    tuned.model.embed_tokens.weight.data *= 1.1
    tuned.save_pretrained(tmp_path / "ft1")
    conversion = convert(tmp_path / "base", tmp_path / "ft1", to="latte", rank=RANK)
    conversion.save(tmp_path / "latte")
    rows = conversion.report["tensors"]
    assert {rows[n]["status"] for n in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")} == {"exact"}
    model = adapt_convert.load(case.model(), tmp_path / "latte")
    torch.testing.assert_close(logits(model, inputs), logits(tuned, inputs), atol=1e-4, rtol=0)
