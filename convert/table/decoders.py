"""Decoders of text without experts."""

from __future__ import annotations

from dataclasses import replace

from adapt_convert.convert.family import MLP_ROLES, Block, Family, Score, Stream

HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
QKV = {role: f"self_attn.{role}_proj" for role in ("q", "k", "v")}
ATTENTION = {**QKV, "o": "self_attn.o_proj"}
MLP = {role: f"mlp.{role}_proj" for role in MLP_ROLES}
LATENT = "queries, keys and values of each head come from a latent vector, so no matrix of theirs reads the residual stream"
LINEAR = "most of its layers have linear attention, and in the others queries share a weight with a gate"
LINEAR_ALONE = "most of its layers have linear attention"
_UP_DOWN = {role: MLP[role] for role in ("up", "down")}
_LLAMA_NORMS = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}
_POST_NORMS = "it normalises what its writers add, and that norm depends on more than the carried dims"
_WTE = {"lm_head.weight": "transformer.wte.weight"}
_WORDS = {"lm_head.weight": "transformer.word_embeddings.weight"}
_DENSE_4H = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    prefix="model",
    blocks=(Block("model.layers.{}", {**ATTENTION, **MLP}),),
    tied=HEAD,
    stream=Stream(_LLAMA_NORMS, "model.norm", "rms"),
    rotary=True,
)
_LIKE_LLAMA = replace(LLAMA, stream=None)
_GLM = replace(
    _LIKE_LLAMA,
    model_types=("glm",),
    blocks=(Block("model.layers.{}", {**ATTENTION, "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}),),
)
_FALCON = Family(  # its releases hold q, k and v in three ways, which are one: groups of as many queries as share a head of keys
    model_types=("falcon",),
    prefix="transformer",
    blocks=(Block("transformer.h.{}", {"qkv_groups": "self_attention.query_key_value", "o": "self_attention.dense", **_DENSE_4H}),),
    tied=_WORDS,
    rotary=True,
)
_GPT2_ROLES = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}

_MAMBA = Family(
    model_types=("mamba2",),
    prefix="backbone",
    blocks=(),
    tied={"lm_head.weight": "backbone.embeddings.weight"},
    whole=("mixer.out_proj",),
    why_no_lorta="it has state-space layers and no attention",
)


def bart_layer(path: str) -> Block:
    return Block(path, {**QKV, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"})


_OPT = Family(
    model_types=("opt",),
    prefix="model",
    blocks=(bart_layer("model.decoder.layers.{}"),),
    tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    stream=Stream({"self_attn_layer_norm": ("q", "k", "v"), "final_layer_norm": ("up",)}, "model.decoder.final_layer_norm", "layer"),
    score=Score("self_attn"),
)

DECODERS: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, model_types=("gemma",), stream=Stream(_LLAMA_NORMS, "model.norm", "gemma")),
    replace(
        _LIKE_LLAMA,
        model_types=("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"),
        why_no_latte=_POST_NORMS,
    ),
    replace(
        _LIKE_LLAMA,
        model_types=(
            *("olmo", "stablelm", "cohere", "cohere2", "granite", "ministral", "ministral3", "helium", "cwm"),
            *("seed_oss", "ernie4_5", "hunyuan_v1_dense", "diffllama"),
        ),
    ),
    replace(
        _LIKE_LLAMA,
        model_types=("arcee", "apertus", "nemotron", "jais2"),
        blocks=(Block("model.layers.{}", {**ATTENTION, **_UP_DOWN}),),
    ),
    replace(
        _LIKE_LLAMA,
        model_types=("lfm2",),
        blocks=(
            Block(
                "model.layers.{}",
                {**QKV, "o": "self_attn.out_proj", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
            ),
        ),
    ),
    _GLM,
    replace(_GLM, model_types=("glm4",), why_no_latte=_POST_NORMS),
    replace(_LIKE_LLAMA, model_types=("qwen3_5_text",), blocks=(), why_no_lorta=LINEAR),
    Family(
        model_types=("starcoder2",),
        prefix="model",
        blocks=(Block("model.layers.{}", {**ATTENTION, "up": "mlp.c_fc", "down": "mlp.c_proj"}),),
        tied=HEAD,
        rotary=True,
    ),
    Family(
        model_types=("phi",),
        prefix="model",
        blocks=(Block("model.layers.{}", {**QKV, "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}),),
        tied=HEAD,
        rotary=True,
    ),
    Family(
        model_types=("phi3",),
        prefix="model",
        blocks=(
            Block(
                "model.layers.{}",
                {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
            ),
        ),
        tied=HEAD,
        stream=Stream({"input_layernorm": ("qkv",), "post_attention_layernorm": ("gate_up",)}, "model.norm", "rms"),
        rotary=True,
    ),
    Family(
        model_types=("persimmon",),
        prefix="model",
        blocks=(Block("model.layers.{}", {"qkv_groups": "self_attn.query_key_value", "o": "self_attn.dense", **_DENSE_4H}),),
        tied=HEAD,
        rotary=True,
    ),
    Family(
        model_types=("gpt_neox",),
        prefix="gpt_neox",
        blocks=(Block("gpt_neox.layers.{}", {"qkv_groups": "attention.query_key_value", "o": "attention.dense", **_DENSE_4H}),),
        tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
        renames=((r"^embed_out\.", "lm_head."),),
        rotary=True,
    ),
    _FALCON,
    replace(_FALCON, model_types=("bloom",), rotary=False),
    Family(
        model_types=("mpt",),
        prefix="transformer",
        blocks=(Block("transformer.blocks.{}", {"qkv": "attn.Wqkv", "o": "attn.out_proj", "up": "ffn.up_proj", "down": "ffn.down_proj"}),),
        tied=_WTE,
    ),
    Family(
        model_types=("gptj",),
        prefix="transformer",
        blocks=(
            Block(
                "transformer.h.{}",
                {**{r: f"attn.{r}_proj" for r in ("q", "k", "v")}, "o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"},
            ),
        ),
        tied=_WTE,
        rotary=True,
    ),
    Family(
        model_types=("gpt_neo",),
        prefix="transformer",
        blocks=(
            Block(
                "transformer.h.{}",
                {
                    **{r: f"attn.attention.{r}_proj" for r in ("q", "k", "v")},
                    **{"o": "attn.attention.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
                },
            ),
        ),
        tied=_WTE,
    ),
    Family(
        model_types=("gpt_bigcode",),
        prefix="transformer",
        blocks=(Block("transformer.h.{}", {"qkv_groups": "attn.c_attn", **_GPT2_ROLES}),),
        tied=_WTE,
    ),
    Family(
        model_types=("gpt2",),
        prefix="transformer",
        blocks=(Block("transformer.h.{}", {"qkv": "attn.c_attn", **_GPT2_ROLES}),),
        tied=_WTE,
        conv1d=True,
        stream=Stream({"ln_1": ("qkv",), "ln_2": ("up",)}, "transformer.ln_f", "layer"),
        score=Score("attn"),
    ),
    Family(
        model_types=("openai-gpt",),
        prefix="transformer",
        blocks=(Block("transformer.h.{}", {"qkv": "attn.c_attn", **_GPT2_ROLES}),),
        tied={"lm_head.weight": "transformer.tokens_embed.weight"},
        conv1d=True,
    ),
    _OPT,
    Family(("xglm",), "model", (bart_layer("model.layers.{}"),), tied=HEAD),
    Family(("biogpt",), "biogpt", (bart_layer("biogpt.layers.{}"),), tied={"output_projection.weight": "biogpt.embed_tokens.weight"}),
    Family(("minicpm3",), "model", blocks=(), tied=HEAD, rotary=True, why_no_lorta=LATENT),
    replace(_MAMBA, model_types=("mamba", "falcon_mamba"), whole=("mixer.out_proj", "mixer.dt_proj")),
    _MAMBA,
    Family(
        model_types=("nemotron_h",),
        prefix="model",
        blocks=(),
        tied={"lm_head.weight": "model.embeddings.weight"},
        renames=((r"^backbone\.", "model."),),
        whole=("mixer.out_proj",),
        why_no_lorta="most of its layers are state-space layers or experts",
    ),
    replace(
        _LIKE_LLAMA,
        model_types=("falcon_h1",),
        blocks=(Block("model.layers.{}", {**ATTENTION, **{role: f"feed_forward.{role}_proj" for role in MLP_ROLES}}),),
        whole=("mamba.out_proj",),
    ),
    Family(
        model_types=("modernbert-decoder",),
        prefix="model",
        blocks=(
            Block(
                "model.layers.{}",
                {**{r: f"attn.{r}_proj" for r in ("q", "k", "v")}, "o": "attn.Wo", "gate_up": "mlp.Wi", "down": "mlp.Wo"},
            ),
        ),
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        rotary=True,
    ),
)
