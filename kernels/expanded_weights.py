"""The expanded weights of a LatTE: the base's in the first block, bit for bit, and what the adapter adds around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.latte import Segment
from adapt_convert.kernels.latte_modules import ExpandedLinear


def check_blocks(blocks: list[Tensor | None], weight: Tensor, segment: Segment, reads: bool, where: str) -> None:
    """Whether an adapter's blocks fit the `weight (out, in)` that they expand. Raises `AdaptError`."""
    expected = (weight.shape[0], segment.rank) if reads else (segment.rank, weight.shape[1])
    for block in blocks:
        if block is not None and tuple(block.shape) != expected:
            raise AdaptError(f"{where}: has a block of {list(block.shape)}, the model needs {list(expected)}: made for another base")
    width = weight.shape[1 if reads else 0]
    if segment.Q.shape[0] != width:
        raise AdaptError(f"{where}: the adapter's residual stream is {segment.Q.shape[0]} wide, the model's {width}")


def reader_weight(weight: Tensor, Q: Tensor, blocks: list[Tensor | None], gain: Tensor | None) -> Tensor:
    """`[W | -W g Q | B_1 + W g Q | .. | B_T + W g Q]` for `[h; w; s_1 .. s_T]`, of which a row of task k sees h, w and s_k.

    Together `W g h + W g Q (s_k - w) + B_k s_k`. `gain (d,)` is that of the norm in front; None where there is none.
    """
    (rows, d), r = weight.shape, Q.shape[1]
    expanded = weight.new_empty(rows, d + (len(blocks) + 1) * r)
    expanded[:, :d] = weight
    carried = weight.float() @ (Q if gain is None else gain[:, None] * Q)
    expanded[:, d : d + r] = -carried
    for number, block in enumerate(blocks, 1):
        part = carried if block is None else carried + block.to(weight.device, torch.float32)
        expanded[:, d + number * r : d + (number + 1) * r] = part
    return expanded


def writer_weight(weight: Tensor, Q: Tensor, blocks: list[Tensor | None]) -> Tensor:
    """`[W; Q^T W; Q^T W + S_1; ..; Q^T W + S_T]`: what it adds to h, to w and to every `s_k`."""
    (d, columns), r = weight.shape, Q.shape[1]
    expanded = weight.new_empty(d + (len(blocks) + 1) * r, columns)
    expanded[:d] = weight
    carried = Q.T @ weight.float()
    expanded[d : d + r] = carried
    for number, block in enumerate(blocks, 1):
        part = carried if block is None else carried + block.to(weight.device, torch.float32)
        expanded[d + number * r : d + (number + 1) * r] = part
    return expanded


def bias_table(base: Tensor | None, biases: list[Tensor | None], weight: Tensor, Q: Tensor | None) -> Tensor | None:
    """The expanded bias of the base and of every task, `(T + 1, out ..)`; None where there is none.

    `Q` is given for a writer, whose bias adds to w and to every `s_k` as well.
    """
    if base is None and all(bias is None for bias in biases):
        return None
    own = torch.zeros(weight.shape[0], device=weight.device) if base is None else base.detach().float()
    stacked = torch.stack([own, *(own if bias is None else bias.to(weight.device, torch.float32) for bias in biases)])
    if Q is not None:
        stacked = torch.cat([stacked, (stacked @ Q).repeat(1, len(biases) + 1)], dim=1)
    return stacked.to(weight.dtype)


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
