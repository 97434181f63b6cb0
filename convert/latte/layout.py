"""Where LatTE's expansion acts in each supported architecture: which norm feeds which readers, and which matrices write.

The residual-stream construction needs to know the norm before every reader, because the norm's gain is folded into the
reader's effective delta, and needs each block to be `h + writer(...)`, with nothing in between or, after that, a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapt_convert.convert.families import BY_MODEL_TYPE
from adapt_convert.convert.family import WRITERS, Family, NormKind
from adapt_convert.formats.errors import AdaptError


@dataclass(frozen=True)
class Layout:
    """One architecture, in the names of its modules in memory.

    `block` has `{}` for the layer number; `readers` leads from a norm to the matrices that read its output, `writers` are the
    matrices that add to the residual stream, all below `block`. `norm` says how a gain acts: `rms` multiplies by the weight,
    `gemma` by one plus the weight, `layer` also subtracts the mean and adds a bias.
    `post_norms` are the norms that follow the writers' additions, in order, of encoders that normalise the stream itself: their
    readers read the stream as it is, so no gain is folded (the key of `readers` is empty) and no norm is left at the end.
    """

    block: str
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final_norm: str
    norm: NormKind
    conv1d: bool = False
    post_norms: tuple[str, ...] = ()

    @property
    def layers(self) -> str:
        """The path of the list of layers."""
        return self.block.removesuffix(".{}")


def _layout(family: Family) -> Layout:
    """What the architecture table says, as this file's readers want it: roles become module names."""
    block, stream = family.blocks[0], family.stream
    assert stream is not None
    readers = {norm: tuple(block.roles[role] for role in roles) for norm, roles in stream.norms.items()}
    writers = tuple(block.roles[role] for role in WRITERS)
    return Layout(block.path, readers, writers, stream.final, stream.kind, family.conv1d, stream.post_norms)


LAYOUTS: dict[str, Layout] = {name: _layout(family) for name, family in BY_MODEL_TYPE.items() if family.stream}


def layout_of(config: Mapping[str, Any], origin: str) -> Layout:
    """The layout of a `config.json`. Raises `AdaptError` that names what is supported, for any other architecture."""
    model_type = str(config.get("model_type"))
    layout = LAYOUTS.get(model_type)
    family = BY_MODEL_TYPE.get(model_type)
    reason = (family.why_no_latte if family else "") or _variant_reason(model_type, config)
    if layout is None or reason:
        why = f" ({reason})" if reason else ""
        raise AdaptError(f"{origin}: LatTE does not support {model_type}{why}; supported: {', '.join(LAYOUTS)}; use --to lora")
    return layout


def _variant_reason(model_type: str, config: Mapping[str, Any]) -> str:
    if model_type == "opt" and not config.get("do_layer_norm_before", True):
        return "this one normalises after its residual additions"
    if model_type == "opt" and config.get("_remove_final_layer_norm"):
        return "this one has no final norm"
    if config.get("add_cross_attention"):
        return "this one has cross-attention"
    return ""


@dataclass(frozen=True)
class ScoreLayout:
    """The attention of one architecture without rotary embeddings, for the score construction.

    `inputs` are q, k and v below `block`, or one fused matrix of all three; `output` is o. `owner` is the module whose attribute
    `size` holds the head size and, in GPT-2, `split_size` that of all heads.
    """

    block: str
    inputs: tuple[str, ...]
    output: str
    owner: str
    size: str = "head_dim"
    conv1d: bool = False

    @property
    def layers(self) -> str:
        """The path of the list of layers."""
        return self.block.removesuffix(".{}")


def _score_layout(family: Family) -> ScoreLayout:
    block, score = family.blocks[0], family.score
    assert score is not None
    inputs = tuple(block.roles[role] for role in (("qkv",) if "qkv" in block.roles else ("q", "k", "v")))
    return ScoreLayout(block.path, inputs, block.roles["o"], score.owner, score.size, family.conv1d)


SCORE_LAYOUTS: dict[str, ScoreLayout] = {name: _score_layout(family) for name, family in BY_MODEL_TYPE.items() if family.score}


def score_layout_of(config: Mapping[str, Any], origin: str) -> ScoreLayout:
    """The layout of a `config.json`. Raises `AdaptError`: with rotary embeddings the construction does not hold."""
    model_type = str(config.get("model_type"))
    if model_type in SCORE_LAYOUTS:
        return SCORE_LAYOUTS[model_type]
    family = BY_MODEL_TYPE.get(model_type)
    if family is not None and family.rotary:
        raise AdaptError(
            f"--construction score: {model_type} rotates queries and keys after their product with the weights, so the low-rank part "
            "of a score is no product of expanded heads; use --construction residual, which is exact with rotary embeddings"
        )
    raise AdaptError(f"{origin}: --construction score does not support {model_type}; supported: {', '.join(SCORE_LAYOUTS)}; use --to lora")


def check_latte(config: Mapping[str, Any], origin: str, rank: int | None, segments: int | str | None, construction: str) -> None:
    """Refuse, from `config.json` alone, what a LatTE of this base cannot be. Raises `AdaptError`."""
    if construction == "score":
        score_layout_of(config, origin)
    else:
        layout_of(config, origin)
    width = next((int(config[n]) for n in ("hidden_size", "n_embd", "d_model", "dim") if isinstance(config.get(n), int)), None)
    layers = next((int(config[n]) for n in ("num_hidden_layers", "n_layer", "n_layers") if isinstance(config.get(n), int)), None)
    if rank is not None and width is not None and rank > width:
        raise AdaptError(f"--rank {rank}: the residual stream of {origin} is {width} wide; a basis of it has at most {width} dims")
    if isinstance(segments, int) and layers is not None and segments > layers:
        raise AdaptError(f"--segments {segments}: {origin} has {layers} layers; give at most that many")
