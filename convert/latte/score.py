"""LatTE's score construction (the paper's Theorem 2): expanded query and key heads whose dot products are the LoRA's scores.

With `q = (W_Q + a_Q b_Q) x + c_Q`, `k = (W_K + a_K b_K) x + c_K` and `xbar = b_Q x`, a head of d_h dims grows by r:

    query rows [W_Q, a_Q; a_K^T W_Q, a_K^T a_Q],   key rows [W_K, a_K; b_K, -I]   on   [x; xbar],

so that `q' . k' = q . (W_K x_n + a_K b_Q x_n + c_K) + (a_K^T q) . (b_K x_n - b_Q x_n) = q . k`. (The paper's Eq. 1 and its proof use the
letters A and B for opposite blocks.) What the paper leaves out: `a_K^T q` belongs to one head, so every head needs r extra query
dims of its own; the r extra key dims are common to all heads. An added head cannot carry them, as it has a softmax of its own.
A rotary embedding turns q and k between these products and the score, by an angle that depends on the two positions: `a_K^T R q`
is not `R' a_K^T q` for any rotation R' of the extra dims, so the construction does not hold there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.errors import AdaptError


@dataclass(frozen=True)
class ScoreBlocks:
    """Expanded heads: `query` and `key (H, d_h + p, d + r)` act on `[x; xbar]` with `xbar = into @ x`, `into (r, d)`.

    `query_bias` and `key_bias (H, d_h + p)`. `extra = p >= r` is even; the last `p - r` dims are zero. Scores keep the scale of d_h.
    """

    query: Tensor
    key: Tensor
    into: Tensor
    query_bias: Tensor
    key_bias: Tensor
    extra: int


def score_blocks(
    query: Tensor, key: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, lora_q: LowRankDelta, lora_k: LowRankDelta, heads: int
) -> ScoreBlocks:
    """The blocks of Theorem 2, made per head, exact for any number of heads.

    `query` and `key` are the base's `(H d_h, d)`, the LoRAs' deltas of the same shape; the smaller rank is padded with zeros.
    Computes in float32.
    """
    rank = max(lora_q.rank, lora_k.rank)
    q, k = (lora.cast(torch.float32).padded(rank) for lora in (lora_q, lora_k))
    extra = widened(rank)
    W_q, W_k, A_q, A_k = (_by_head(m, heads) for m in (query, key, q.B, k.B))
    upper = torch.cat([W_q, A_q], dim=2)
    lower = A_k.mT @ upper
    own_key = torch.cat([W_k, A_k], dim=2)
    shared = torch.cat([k.A, -torch.eye(rank, device=k.A.device)], dim=1).expand(heads, -1, -1)
    c_q, c_k = (W_q.new_zeros(W_q.shape[:2]) if c is None else _by_head(c, heads) for c in (query_bias, key_bias))
    return ScoreBlocks(
        query=_pad_rows(torch.cat([upper, lower], dim=1), extra - rank),
        key=_pad_rows(torch.cat([own_key, shared], dim=1), extra - rank),
        into=q.A,
        query_bias=_pad_rows(torch.cat([c_q, (A_k.mT @ c_q[..., None])[..., 0]], dim=1), extra - rank),
        key_bias=_pad_rows(c_k, extra),
        extra=extra,
    )


def widened(rank: int) -> int:
    """Dims that each head gains so that rank-`rank` scores are exact: the rank, rounded up to even."""
    return 2 * math.ceil(rank / 2)


def paper_padding(rank: int, heads: int, head_size: int, how: Literal["wider", "more"]) -> int:
    """The paper's zero padding: even widening of each head, or the number of added heads, for `rank` extra dims in total.

    Neither can be exact in general: exactness takes `widened(rank)` dims in every head.
    """
    return 2 * math.ceil(rank / (2 * heads)) if how == "wider" else math.ceil(rank / head_size)


def check_heads(how: str, rank: int) -> None:
    """Refuse `--heads more`: the score construction has no exact form with it."""
    if how == "more":
        raise AdaptError(
            "--heads more: an added head has a softmax of its own and cannot add to another head's scores; "
            f"--heads wider is exact, with {widened(rank)} more dims in every head"
        )


def _by_head(rows: Tensor, heads: int) -> Tensor:
    return rows.float().reshape(heads, -1, *rows.shape[1:])


def _pad_rows(blocks: Tensor, count: int) -> Tensor:
    """Zeros after the last row of every head."""
    return torch.cat([blocks, blocks.new_zeros(blocks.shape[0], count, *blocks.shape[2:])], dim=1)
