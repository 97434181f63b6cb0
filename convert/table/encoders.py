"""Encoders of text and images, and models of an encoder and a decoder."""

from __future__ import annotations

from dataclasses import replace

from adapt_convert.convert.family import ATTENTION_ROLES, Block, Family, Score, Stream
from adapt_convert.convert.table.decoders import QKV, bart_layer

_BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_BERT_STREAM = Stream({"": ("q", "k", "v", "up")}, "", "layer", post_norms=("attention.output.LayerNorm", "output.LayerNorm"))


def _tied_predictions(backbone: str, at: str, bias: str) -> dict[str, str]:
    """The output layer `at`, which shares the table of words and the bias `bias` beside it."""
    return {f"{at}.weight": f"{backbone}.embeddings.word_embeddings.weight", f"{at}.bias": bias}


_BERT = Family(
    model_types=("bert",),
    prefix="bert",
    blocks=(Block("bert.encoder.layer.{}", _BERT_ROLES),),
    tied=_tied_predictions("bert", "cls.predictions.decoder", "cls.predictions.bias"),
    stream=_BERT_STREAM,
    score=Score("attention.self", size="attention_head_size"),
)
_ROBERTA = replace(
    _BERT,
    model_types=("roberta", "xlm-roberta"),
    prefix="roberta",
    blocks=(Block("roberta.encoder.layer.{}", _BERT_ROLES),),
    tied=_tied_predictions("roberta", "lm_head.decoder", "lm_head.bias"),
)
_PLAIN_ROBERTA = replace(_ROBERTA, model_types=("camembert", "xlm-roberta-xl"), stream=None, score=None)

TEXT_ENCODERS: tuple[Family, ...] = (
    _BERT,
    _ROBERTA,
    _PLAIN_ROBERTA,
    Family(
        model_types=("distilbert",),
        prefix="distilbert",
        blocks=(
            Block(
                "distilbert.transformer.layer.{}",
                {**{r: f"attention.{r}_lin" for r in ("q", "k", "v")}, "o": "attention.out_lin", "up": "ffn.lin1", "down": "ffn.lin2"},
            ),
        ),
        tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        stream=Stream({"": ("q", "k", "v", "up")}, "", "layer", post_norms=("sa_layer_norm", "output_layer_norm")),
    ),
    Family(
        model_types=("electra",),
        prefix="electra",
        blocks=(Block("electra.encoder.layer.{}", _BERT_ROLES),),
        tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ),
    Family(
        model_types=("albert",),
        prefix="albert",
        blocks=(
            Block(
                "albert.encoder.albert_layer_groups.{}.albert_layers.0",
                {
                    **{"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.dense"},
                    **{"up": "ffn", "down": "ffn_output"},
                },
            ),
        ),
        tied=_tied_predictions("albert", "predictions.decoder", "predictions.bias"),
    ),
    Family(
        model_types=("deberta-v2",),
        prefix="deberta",
        blocks=(
            Block(
                "deberta.encoder.layer.{}",
                _BERT_ROLES | {role: f"attention.self.{name}_proj" for role, name in zip("qkv", ("query", "key", "value"), strict=True)},
            ),
        ),
        tied=_tied_predictions("deberta", "cls.predictions.decoder", "cls.predictions.bias"),
    ),
    Family(
        model_types=("mpnet",),
        prefix="mpnet",
        blocks=(Block("mpnet.encoder.layer.{}", _BERT_ROLES | {role: f"attention.attn.{role}" for role in ATTENTION_ROLES}),),
        tied=_tied_predictions("mpnet", "lm_head.decoder", "lm_head.bias"),
    ),
    Family(
        model_types=("modernbert",),
        prefix="model",
        blocks=(Block("model.layers.{}", {"qkv": "attn.Wqkv", "o": "attn.Wo", "gate_up": "mlp.Wi", "down": "mlp.Wo"}),),
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        rotary=True,
    ),
)
IMAGE_ENCODERS: tuple[Family, ...] = (
    Family(
        model_types=("vit",),
        prefix="vit",
        blocks=(
            Block(
                "vit.layers.{}",
                {**{r: f"attention.{r}_proj" for r in ATTENTION_ROLES}, "up": "mlp.fc1", "down": "mlp.fc2"},
            ),
        ),
        renames=(
            (r"encoder\.layer\.", "layers."),
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ),
        stream=Stream({"layernorm_before": ("q", "k", "v"), "layernorm_after": ("up",)}, "vit.layernorm", "layer"),
        score=Score("attention"),
    ),
)


def _t5_attention(path: str) -> Block:
    return Block(path, {role: role for role in ATTENTION_ROLES})


def _t5_mlp(path: str) -> Block:
    return Block(path, {"gate": "wi_0", "up": "wi_1|wi", "down": "wo"})


_CROSS = {role: module.replace("self_attn", "encoder_attn") for role, module in QKV.items()} | {"o": "encoder_attn.out_proj"}
_BART = Family(
    model_types=("bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot"),
    prefix="model",
    blocks=(
        bart_layer("model.encoder.layers.{}"),
        bart_layer("model.decoder.layers.{}"),
        Block("model.decoder.layers.{}", _CROSS),
    ),
    tied={f"{m}.weight": "model.shared.weight" for m in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")},
)

ENCODER_DECODERS: tuple[Family, ...] = (
    _BART,
    replace(_BART, model_types=("whisper",), tied={"proj_out.weight": "model.decoder.embed_tokens.weight"}),
    Family(
        model_types=("t5", "mt5"),
        prefix="",
        blocks=(
            _t5_attention("encoder.block.{}.layer.0.SelfAttention"),
            _t5_attention("decoder.block.{}.layer.0.SelfAttention"),
            _t5_attention("decoder.block.{}.layer.1.EncDecAttention"),
            _t5_mlp("encoder.block.{}.layer.1.DenseReluDense"),
            _t5_mlp("decoder.block.{}.layer.2.DenseReluDense"),
        ),
        tied={f"{module}.weight": "shared.weight" for module in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    ),
)
ENCODERS = (*TEXT_ENCODERS, *IMAGE_ENCODERS, *ENCODER_DECODERS)
