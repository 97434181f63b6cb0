"""LatTE's score construction: exact per head, not with fewer dims, not with rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import adapt_convert
from adapt_convert.convert.conversion import convert
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.latte.layout import SCORE_LAYOUTS
from adapt_convert.convert.latte.score import ScoreBlocks, paper_padding, score_blocks, widened
from adapt_convert.convert.latte.score_solver import OUT_OF_REACH
from adapt_convert.formats.errors import AdaptError

from .conftest import MODELS, save_pair
from .test_latte import CASES

D, HEADS, SIZE, TOKENS = 24, 3, 8, 5


def problem(rank_q: int, rank_k: int, heads: int = HEADS) -> dict[str, Any]:
    """Random weights, biases, LoRAs and inputs."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    width = heads * SIZE
    return {
        "query": draw(width, D),
        "key": draw(width, D),
        "query_bias": draw(width),
        "key_bias": draw(width),
        "lora_q": LowRankDelta(draw(width, rank_q), draw(rank_q, D)),
        "lora_k": LowRankDelta(draw(width, rank_k), draw(rank_k, D)),
        "heads": heads,
    }


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(4))


def heads_of(p: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the model with its LoRA, `(H, tokens, d_h)`, by definition."""
    q = x @ (p["query"] + p["lora_q"].dense()).T + p["query_bias"]
    k = x @ (p["key"] + p["lora_k"].dense()).T + p["key_bias"]
    return tuple(m.view(len(x), p["heads"], -1).transpose(0, 1) for m in (q, k))  # type: ignore[return-value]


def expanded_heads(blocks: ScoreBlocks, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat([x, x @ blocks.into.T], dim=1)
    q = torch.einsum("hij,nj->hni", blocks.query, both) + blocks.query_bias[:, None]
    k = torch.einsum("hij,nj->hni", blocks.key, both) + blocks.key_bias[:, None]
    return q, k


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.mT


@pytest.mark.parametrize(("heads", "rank_q", "rank_k"), [(1, 2, 2), (3, 2, 2), (3, 3, 5), (4, 6, 1), (2, 7, 7)])
def test_scores_equal_those_of_the_lora(heads: int, rank_q: int, rank_k: int) -> None:
    p, x = problem(rank_q, rank_k, heads), inputs()
    blocks = score_blocks(**p)
    assert blocks.extra == widened(max(rank_q, rank_k))
    torch.testing.assert_close(scores(*expanded_heads(blocks, x)), scores(*heads_of(p, x)), atol=1e-5, rtol=0)
    base = {**p, "lora_q": LowRankDelta(0 * p["lora_q"].B, p["lora_q"].A), "lora_k": LowRankDelta(0 * p["lora_k"].B, p["lora_k"].A)}
    assert (scores(*heads_of(base, x)) - scores(*heads_of(p, x))).abs().max() > 0.05  # the LoRA matters


def test_the_base_weights_are_untouched_in_their_blocks() -> None:
    p = problem(2, 2)
    blocks = score_blocks(**p)
    assert torch.equal(blocks.query[:, :SIZE, :D].reshape(-1, D), p["query"])
    assert torch.equal(blocks.key[:, :SIZE, :D].reshape(-1, D), p["key"])


def test_the_extra_key_dims_are_common_to_all_heads_and_the_query_dims_are_not() -> None:
    blocks = score_blocks(**problem(4, 4))
    assert all(torch.equal(block, blocks.key[0, SIZE:]) for block in blocks.key[:, SIZE:])
    assert (blocks.query[0, SIZE:] - blocks.query[1, SIZE:]).abs().max() > 0.01


def test_r_extra_dims_in_total_are_not_enough() -> None:
    """What is missing in each head's scores has rank r; `2 ceil(r / 2H)` dims per head are fewer, so the best they can do is far off."""
    p, x = problem(4, 4), torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    per_head = paper_padding(4, HEADS, SIZE, "wider")
    assert per_head * HEADS >= 4 > per_head  # r extra dims in total, as the paper counts them
    q, k = heads_of(p, x)
    plain_k = (x @ p["key"].T + p["key_bias"] + x @ p["lora_q"].A.T @ p["lora_k"].B.T).view(len(x), HEADS, SIZE).transpose(0, 1)
    missing = torch.linalg.svdvals((scores(q, k) - scores(q, plain_k)).double())
    assert (missing[:, 4] < 1e-4 * missing[:, 0]).all()  # rank r exactly
    assert (missing[:, per_head] > 0.05 * missing[:, 0]).all()  # Eckart-Young: what no choice of fewer dims can reach


def test_an_added_head_cannot_carry_them() -> None:
    """The attention probabilities of the first heads stay those without the extra term, whatever a further head holds."""
    p, x = problem(4, 4), inputs()
    q, k = heads_of(p, x)
    blocks = score_blocks(**p)
    narrow_q, narrow_k = (m[..., :SIZE] for m in expanded_heads(blocks, x))
    extra_q, extra_k = (torch.randn(1, TOKENS, SIZE) for _ in range(2))
    more = torch.softmax(scores(torch.cat([narrow_q, extra_q]), torch.cat([narrow_k, extra_k])) / math.sqrt(SIZE), -1)
    wanted = torch.softmax(scores(q, k) / math.sqrt(SIZE), -1)
    assert (more[:HEADS] - wanted).abs().max() > 0.01
    assert paper_padding(4, HEADS, SIZE, "more") == 1


def test_rotary_embeddings_break_it() -> None:
    """The same blocks, with the rotation that Llama applies to the d_h dims: exact at equal positions, off at others."""
    p, x = problem(4, 4), inputs()
    angles = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    angles = torch.cat([angles, angles], -1)

    def turned(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        head_q, head_k = apply_rotary_pos_emb(q[None, ..., :SIZE], k[None, ..., :SIZE], angles.cos()[None], angles.sin()[None])
        return scores(torch.cat([head_q[0], q[..., SIZE:]], -1), torch.cat([head_k[0], k[..., SIZE:]], -1))

    error = (turned(*expanded_heads(score_blocks(**p), x)) - turned(*heads_of(p, x))).abs()
    assert error.diagonal(dim1=1, dim2=2).max() < 1e-5
    assert error.max() > 0.05


def test_rotary_models_are_refused_with_the_reason_and_the_alternative(pairs: Callable[[str], Any]) -> None:
    pair = pairs("llama")
    with pytest.raises(AdaptError, match=r"--construction score: llama rotates queries and keys .*; use --construction residual"):
        convert(pair.base, pair.ft, to="latte", rank=2, construction="score")


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "vit"])
def test_a_model_with_wider_heads_equals_its_fine_tune(name: str, tmp_path: Path) -> None:
    """q, k and v changed by rank 3, norms and biases at will: the converted model on the stock attention, and unloaded again."""

    def change(model: Any) -> None:
        layout = SCORE_LAYOUTS[name]
        generator = torch.Generator().manual_seed(8)
        for layer in range(model.config.num_hidden_layers):
            block = model.get_submodule(layout.block.format(layer))
            for module in map(block.get_submodule, layout.inputs):
                weight = module.weight.T if layout.conv1d else module.weight
                for part in weight.chunk(3 if layout.conv1d else 1):
                    part += 0.3 * torch.randn(len(part), 3, generator=generator) @ torch.randn(3, part.shape[1], generator=generator)
                module.bias += 0.1
            for key, parameter in block.named_parameters():
                if "norm" in key.lower() or "ln_" in key:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    pair = save_pair(tmp_path / "pair", *(CASES["opt"] if name == "opt" else MODELS[name]), change)
    conversion = convert(pair.base, pair.ft, to="latte", rank=3, construction="score")
    conversion.save(tmp_path / "latte")
    assert conversion.report["captured_energy"] > 1 - 1e-9
    model = pair.load(pair.base)
    before, expected = pair.logits(pair.load(pair.base)), pair.logits(pair.load(pair.ft))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert (before - expected).abs().max() > 0.01
    adapt_convert.load(model, tmp_path / "latte")
    torch.testing.assert_close(pair.logits(model), expected, atol=1e-4, rtol=0)
    if name in ("gpt2", "opt"):
        ids = {"input_ids": pair.inputs["input_ids"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**ids), pair.load(pair.ft).generate(**ids))
    adapt_convert.unload(model)
    assert torch.equal(pair.logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_the_score_construction_cannot_hold_is_named(pairs: Callable[[str], Any]) -> None:
    pair = pairs("gpt2")
    report = convert(pair.base, pair.ft, to="latte", rank=2, construction="score").report
    row = report["tensors"]["transformer.h.0.mlp.c_fc.weight"]
    assert (row["status"], row["reason"]) == ("dropped", OUT_OF_REACH)
    with pytest.raises(AdaptError, match=r"--heads more: .*--heads wider is exact, with 2 more dims in every head"):
        convert(pair.base, pair.ft, to="latte", rank=2, construction="score", heads="more")
    with pytest.raises(AdaptError, match=r"--strict: .* would be lost"):
        convert(pair.base, pair.ft, to="latte", rank=2, construction="score", strict=True)
