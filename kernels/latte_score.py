"""LatTE by the score construction on a live model: wider query and key heads, read from `[x; xbar]` (convert/latte/score.py).

Attention splits its channels into heads of one size, so v is widened by zeros and o reads none of them; the scale of the scores
stays that of the base, which the stock attention keeps in a field of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.convert.latte.layout import ScoreLayout
from adapt_convert.convert.latte.score import score_blocks, widened
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import LatteAdapter

if TYPE_CHECKING:
    from adapt_convert.kernels.latte import LatteState, Names


class ScoreLinear(nn.Module):
    """`weight @ [x; into @ x] + bias`: an expanded matrix and the thin product that its extra columns read."""

    weight: Tensor
    into: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, into: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("into", into, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.cat([x, functional.linear(x, self.into)], dim=-1), self.weight, self.bias)


class PaddedOutput(nn.Module):
    """The base's o on heads of which only the first `size` channels hold values."""

    def __init__(self, base: nn.Module, size: int, widened_size: int) -> None:
        super().__init__()
        self.base, self.size, self.widened_size = base, size, widened_size

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:-1], -1, self.widened_size)[..., : self.size]
        return self.base(heads.flatten(-2))  # type: ignore[no-any-return]


def expanded_attention(
    weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], loras: Mapping[str, LowRankDelta], size: int
) -> dict[str, ScoreLinear]:
    """Modules for q, k and v of one attention, from the base's weights `(H size, d)` and biases and the low-rank changes."""
    heads = weights["q"].shape[0] // size
    if weights["k"].shape != weights["q"].shape:
        raise AdaptError("the score construction needs as many key as query heads")
    like = weights["q"]
    blocks = score_blocks(weights["q"], weights["k"], biases["q"], biases["k"], loras["q"], loras["k"], heads)
    lora_v = loras["v"]
    value = torch.cat([weights["v"].float(), lora_v.B.float()], dim=1).reshape(heads, size, -1)
    value = functional.pad(value, (0, 0, 0, blocks.extra))
    bias = weights["v"].new_zeros(heads * size) if biases["v"] is None else biases["v"]
    value_bias = functional.pad(bias.float().reshape(heads, size), (0, blocks.extra))

    def module(weight: Tensor, into: Tensor, own_bias: Tensor) -> ScoreLinear:
        return ScoreLinear(weight.flatten(0, 1).to(like), into.to(like), own_bias.flatten().to(like))

    return {
        "q": module(blocks.query, blocks.into, blocks.query_bias),
        "k": module(blocks.key, blocks.into, blocks.key_bias),
        "v": module(value, lora_v.A.float(), value_bias),
    }


class FusedScore(nn.Module):
    """q, k and v of a fused matrix, side by side as its attention splits them."""

    def __init__(self, parts: dict[str, ScoreLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.parts[letter](x) for letter in "qkv"], dim=-1)


def load_scores(model: nn.Module, adapter: LatteAdapter, layout: ScoreLayout, names: Names, state: LatteState, origin: str) -> None:
    """Widen the heads of every attention that the adapter changes and set everything else by value; `state` learns how to undo it."""
    task = adapter.tasks[0]
    for name, value in task.exact.items():
        assert isinstance(value, Tensor)
        state.set_parameter(model, names.live(name), value)
    state.for_all_rows = ["the attention"]
    owners = {name.rpartition(".")[0] for name in task.scores}
    known = {names.held(f"{layout.block.format(layer)}.{layout.owner}") for layer in range(len(names.blocks))}
    if owners - known:
        raise AdaptError(f"{origin}: has scores of {min(owners - known)}, which is no attention of {adapter.model_type}")
    for path in sorted(owners):
        block, prefix = names.live(path.removesuffix(f".{layout.owner}")), f"{path}."
        factors = {name.removeprefix(prefix): value for name, value in task.scores.items() if name.startswith(prefix)}
        swaps, attributes = swaps_of(model.get_submodule(block), layout, factors)
        for name, module in swaps.items():
            state.swap(model, f"{block}.{name}", module)
        owner = model.get_submodule(f"{block}.{layout.owner}")
        for name, size in attributes.items():
            state.attributes.append((owner, name, int(getattr(owner, name))))
            setattr(owner, name, size)


def swaps_of(block: nn.Module, layout: ScoreLayout, factors: Mapping[str, Tensor]) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """What to swap in one block: modules by their paths, and the attributes of the attention with their new values.

    `factors` are `{q,k,v}_{A,B}` of this block; a missing one is a change of zero.
    """
    owner = block.get_submodule(layout.owner)
    size = int(getattr(owner, layout.size))
    weights, biases = _base_parts(block, layout)
    loras = {letter: _lora(factors, letter, weights[letter]) for letter in "qkv"}
    parts = expanded_attention(weights, biases, loras, size)
    wide = size + widened(max(loras["q"].rank, loras["k"].rank))
    fused = len(layout.inputs) == 1
    swaps: dict[str, nn.Module] = {layout.inputs[0]: FusedScore(parts)} if fused else {}
    if not fused:
        swaps |= {name: parts[letter] for name, letter in zip(layout.inputs, "qkv", strict=True)}
    swaps[layout.output] = PaddedOutput(block.get_submodule(layout.output), size, wide)
    attributes = {layout.size: wide}
    if hasattr(owner, "split_size"):
        attributes["split_size"] = wide * (weights["q"].shape[0] // size)
    return swaps, attributes


def _base_parts(block: nn.Module, layout: ScoreLayout) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    modules = [block.get_submodule(name) for name in layout.inputs]
    for module, letters in zip(modules, ["qkv"] if len(modules) == 1 else "qkv", strict=True):
        weight = module.get_parameter("weight").detach()
        bias = getattr(module, "bias", None)
        rows = (weight.T if layout.conv1d else weight).chunk(len(letters))
        own = [None] * len(letters) if bias is None else bias.detach().chunk(len(letters))
        weights |= dict(zip(letters, rows, strict=True))
        biases |= dict(zip(letters, own, strict=True))
    return weights, biases


def _lora(factors: Mapping[str, Tensor], letter: str, weight: Tensor) -> LowRankDelta:
    A, B = factors.get(f"{letter}_A"), factors.get(f"{letter}_B")
    if A is None or B is None:
        return LowRankDelta(weight.new_zeros(weight.shape[0], 1).float(), weight.new_zeros(1, weight.shape[1]).float())
    if A.shape != (B.shape[1], weight.shape[1]) or B.shape[0] != weight.shape[0]:
        raise AdaptError(
            f"{letter}: has factors {list(B.shape)} and {list(A.shape)}, the model needs {list(weight.shape)}: made for another base"
        )
    return LowRankDelta(B.to(weight.device).float(), A.to(weight.device).float())
