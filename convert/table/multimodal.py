"""Language models beside a vision tower, which has no roles: other widths, no part of a common tensor."""

from __future__ import annotations

from dataclasses import replace

from adapt_convert.convert.family import Block, Family
from adapt_convert.convert.table.decoders import ATTENTION, LLAMA, MLP
from adapt_convert.convert.table.mixtures import LLAMA4_EXPERTS, MIXTURE

_INNER = replace(
    LLAMA,
    model_types=("qwen3_vl",),
    blocks=(Block("model.language_model.layers.{}", {**ATTENTION, **MLP}),),
    tied={"lm_head.weight": "model.language_model.embed_tokens.weight"},
    stream=None,
)

MULTIMODAL: tuple[Family, ...] = (
    _INNER,
    replace(
        _INNER,
        model_types=("qwen2_vl", "qwen2_5_vl"),
        renames=((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")),
    ),
    replace(
        _INNER,
        model_types=("llava", "llava_next", "gemma3", "mistral3", "paligemma", "internvl"),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
            (r"^image_newline$", "model.image_newline"),
        ),
    ),
    replace(
        _INNER,
        model_types=("idefics3", "smolvlm"),
        blocks=(Block("model.text_model.layers.{}", {**ATTENTION, **MLP}),),
        tied={"lm_head.weight": "model.text_model.embed_tokens.weight"},
    ),
    replace(
        MIXTURE,
        model_types=("llama4",),
        prefix="",
        blocks=(Block("language_model.model.layers.{}", ATTENTION),),
        tied={},
        experts=LLAMA4_EXPERTS,
    ),
)
