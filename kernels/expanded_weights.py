"""The expanded weights of a LatTE: the base's in the first block, bit for bit, and what the adapter adds around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.latte_modules import ExpandedLinear


def check_block(block: Tensor | None, expected: tuple[int, ...], where: str) -> None:
    """Whether a tensor of the adapter fits the matrix that it expands. Raises `AdaptError`."""
    if block is not None and tuple(block.shape) != expected:
        raise AdaptError(f"{where}: has a block of {list(block.shape)}, the model needs {list(expected)}: made for another base")


def reader_weight(weight: Tensor, Q: Tensor, blocks: list[Tensor | None], gain: Tensor) -> Tensor:
    """`[W | B_1 .. B_T | W g Q]` behind a norm of that `gain`; for one task `[W | B | B + W g Q]` for w and t."""
    d, r, count = weight.shape[1], Q.shape[1], len(blocks)
    carried = weight.float() @ (gain[:, None] * Q)
    if count == 1 and blocks[0] is not None:
        carried += blocks[0].to(weight.device, torch.float32)
    return _beside(weight, d + (count + 1) * r, [*_placed(blocks, d, r), (d + count * r, carried)])


def writer_weight(weight: Tensor, Q: Tensor, blocks: list[Tensor | None]) -> Tensor:
    """`[W; Q^T W; S_1; ..; S_T]`: what it adds to h, to w and to every t."""
    d, r = weight.shape[0], Q.shape[1]
    carried = Q.T @ weight.float()
    return _below(weight, d + (len(blocks) + 1) * r, [(d, carried), *_placed(blocks, d + r, r)])


def post_norm_weight(weight: Tensor, rank: int, blocks: list[Tensor | None], reads: bool) -> Tensor:
    """`[W | B_1 .. B_T | 0]`, which sees every `m_k w` of the stream and no t, or `[W; 0; S_1; ..; S_T]`, which adds to every t alone."""
    d, count = weight.shape[1 if reads else 0], len(blocks)
    width = d + 2 * count * rank
    if reads:
        return _beside(weight, width, _placed(blocks, d, rank))
    return _below(weight, width, _placed(blocks, d + count * rank, rank))


_Placed = tuple[int, Tensor]  # a block and the row or column at which it begins


def _placed(blocks: list[Tensor | None], start: int, rank: int) -> list[_Placed]:
    return [(start + number * rank, block) for number, block in enumerate(blocks) if block is not None]


def _beside(weight: Tensor, width: int, parts: list[_Placed]) -> Tensor:
    """`weight (out, in)` followed by columns up to `width`, zero where no part says otherwise."""
    expanded = weight.new_zeros(weight.shape[0], width)
    expanded[:, : weight.shape[1]] = weight
    for start, part in parts:
        expanded[:, start : start + part.shape[1]] = part.to(weight.device)
    return expanded


def _below(weight: Tensor, height: int, parts: list[_Placed]) -> Tensor:
    expanded = weight.new_zeros(height, weight.shape[1])
    expanded[: weight.shape[0]] = weight
    for start, part in parts:
        expanded[start : start + part.shape[0]] = part.to(weight.device)
    return expanded


def bias_table(base: Tensor | None, biases: list[Tensor | None], weight: Tensor, Q: Tensor | None, rows: int) -> Tensor | None:
    """The expanded bias of the base and of every task, `(T + 1, rows)`; None where there is none.

    `Q` is given for a writer whose stream carries `w = Q^T h`, to which its bias adds as well.
    """
    if base is None and all(bias is None for bias in biases):
        return None
    own = torch.zeros(weight.shape[0], device=weight.device) if base is None else base.detach().float()
    stacked = torch.stack([own, *(own if bias is None else bias.to(weight.device, torch.float32) for bias in biases)])
    if Q is not None:
        stacked = torch.cat([stacked, stacked @ Q], dim=1)
    return nn.functional.pad(stacked, (0, rows - stacked.shape[1])).to(weight.dtype)


def give_back_weight(module: nn.Module, swapped: nn.Module, transposed: bool) -> None:
    """The base's weight out of the expanded one, into the parameter that held it."""
    assert isinstance(swapped, ExpandedLinear)
    rows, columns = _base_shape(module, transposed)
    weight = swapped.weight[:rows, :columns]
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    parameter.data = (weight.T if transposed else weight).clone(memory_format=torch.contiguous_format)


def _base_shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """`(out, in)` of a linear layer or of GPT-2's Conv1D, whose parameter lies empty meanwhile."""
    if transposed:
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
