"""Decoders of text with mixtures of experts.

Only their attention has roles: experts are no part of a common tensor. Where `transformers` stacks experts in memory, PEFT knows the
names on disk for the model types that it translates itself, and has to be told the parameter for the others (`by_parameter`).
"""

from __future__ import annotations

from dataclasses import replace

from adapt_convert.convert.family import Block, Experts, Family
from adapt_convert.convert.table.decoders import ATTENTION, HEAD, LATENT, LINEAR, LINEAR_ALONE

MIXTURE = Family(  # the entries below say which
    model_types=(),
    prefix="model",
    blocks=(Block("model.layers.{}", ATTENTION),),
    tied=HEAD,
    rotary=True,
)
_BY_EXPERT = Experts(
    stacked="mlp.experts",
    router="mlp.gate",
    path="model.layers.{}.mlp.experts.{}",
    modules=("gate_proj", "up_proj", "down_proj"),
)
_W123 = replace(_BY_EXPERT, path="model.layers.{}.block_sparse_moe.experts.{}", modules=("w1", "w3", "w2"))
_MIXTRAL = replace(
    MIXTURE,
    model_types=("mixtral",),
    renames=((r"\.block_sparse_moe\.(gate\.|e_score_correction_bias)", r".mlp.\1"),),
    experts=_W123,
)
# Stored `(experts, in, out)`, but PEFT is not told so by the model class, and adapts what it takes for `(experts, out, in)`.
LLAMA4_EXPERTS = Experts("feed_forward.experts", "feed_forward.router", parameters=("gate_up_proj", "down_proj"))

MIXTURES: tuple[Family, ...] = (
    _MIXTRAL,
    replace(_MIXTRAL, model_types=("minimax_m2",)),
    replace(_MIXTRAL, model_types=("minimax",), blocks=(), why_no_lorta=LINEAR_ALONE),
    replace(
        _MIXTRAL,
        model_types=("phimoe",),
        renames=((r"\.block_sparse_moe\.gate\.", ".mlp.router."),),
        experts=replace(_W123, router="mlp.router", by_parameter=True),
    ),
    replace(
        MIXTURE,
        model_types=(
            *("qwen3_moe", "olmoe", "dots1", "glm4_moe", "flex_olmo"),
            *("beam", "cohere2_moe", "mellum", "solar_open"),
        ),
        experts=_BY_EXPERT,
    ),
    replace(MIXTURE, model_types=("hunyuan_v1_moe",), experts=replace(_BY_EXPERT, router="mlp.gate.wg")),
    replace(MIXTURE, model_types=("afmoe",), experts=replace(_BY_EXPERT, router="mlp.router.gate")),
    replace(
        MIXTURE,
        model_types=("exaone_moe",),
        renames=((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),),
        experts=_BY_EXPERT,
    ),
    replace(
        MIXTURE,
        model_types=("ernie4_5_moe",),
        renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
        experts=_BY_EXPERT,
    ),
    replace(MIXTURE, model_types=("qwen3_next",), blocks=(), experts=_BY_EXPERT, why_no_lorta=LINEAR),
    replace(MIXTURE, model_types=("qwen2_moe",), experts=replace(_BY_EXPERT, by_parameter=True)),
    replace(
        MIXTURE,
        model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        blocks=(),
        experts=_BY_EXPERT,
        why_no_lorta=LATENT,
    ),
    replace(
        MIXTURE,
        model_types=("jamba",),
        experts=replace(
            _BY_EXPERT,
            stacked="feed_forward.experts",
            router="feed_forward.router",
            path="model.layers.{}.feed_forward.experts.{}",
            by_parameter=True,
        ),
        whole=("mamba.dt_proj",),
    ),
    replace(MIXTURE, model_types=("llama4_text",), experts=LLAMA4_EXPERTS),
    replace(
        MIXTURE,
        model_types=("granitemoe", "granitemoeshared"),
        renames=(
            (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
            (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
        ),
        experts=Experts("block_sparse_moe.experts", "block_sparse_moe.router", parameters=("gate_up_proj", "down_proj")),
    ),
    replace(
        MIXTURE,
        model_types=("gpt_oss",),
        experts=Experts(
            stacked="mlp.experts",
            router="mlp.router",
            parameters=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
            transposed=True,
        ),
    ),
)
