# SPDX-License-Identifier: Apache-2.0
"""Attention weights that a fused kernel does not return, computed exactly from q and k.

On a CPU each image is computed by itself: a product of several is a product of another shape, which
BLAS rounds otherwise, and the last bits of two nearly equal scores decide which tokens Algorithm 1
leaves. An image would then keep other tokens under load than on a quiet server. It costs nothing
there; a GPU would wait for the launches.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, float], Tensor]

MOST_QUERIES: Final = 4096
"""Tokens that are all asked. Of more, `SAMPLED` are: the attention of all would grow with the
square of the tokens, as that of the tower's layers does, and take as long as several of them."""
SAMPLED: Final = 1024
"""Queries that stand for all those of a larger image."""
_QUERY_BLOCK = 128
"""Queries handled at once, instead of a full map."""
_LOGITS_AT_ONCE = 2**20
"""Of one head of a larger image: 4 MiB of float32 stay in a core's cache."""
_GOLDEN = (5**0.5 - 1) / 2


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the CLS token (position 0), summed over heads.

    A kernel of its own would bring nothing: one query per head reads every key once, O(T d), and
    is a few launches behind a layer of dozens.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits, ``1 / sqrt(d)`` as a rule.

    Returns:
        ``(B, T)`` float32, CLS included; divide by the number of heads for the mean of eq. 1.

    """
    return _cls(query, key, scale) if query.is_cuda else _of_each(_cls, query, key, scale)


def _cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float()) * scale
    return logits.softmax(dim=-1).sum(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from all tokens, summed over queries and heads.

    For towers without CLS (as the released Qwen code reads eq. 1). Of more than `MOST_QUERIES`
    tokens it is estimated from `SAMPLED` queries, spread evenly. On CUDA by two fused kernels,
    where triton is installed; elsewhere image by image, by blocks of queries.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits.

    Returns:
        ``(B, T)`` float32.

    """
    tokens = query.shape[1]
    is_sampled = tokens > MOST_QUERIES
    if is_sampled:
        query = query[:, spread_queries(tokens, SAMPLED, query.device)]
    share = tokens / query.shape[1]
    if query.is_cuda and (fused := _fused()) is not None:
        return fused(query, key, scale) * share
    return _of_each(_received_by_head if is_sampled else _received, query, key, scale) * share


def spread_queries(tokens: int, count: int, device: torch.device) -> Tensor:
    """Return one query of each of ``count`` equal stretches, ``(count,)`` int64, ascending.

    Where in its stretch follows the golden ratio. Always the middle one would be the same patch of
    every merged square, or the same column of every row, wherever a stretch is a multiple of those.
    """
    numbers = torch.arange(count, dtype=torch.float64)
    within = (numbers * _GOLDEN) % 1.0
    return ((numbers + within) * (tokens / count)).long().clamp_max(tokens - 1).to(device)


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    tokens = query.shape[1]
    key = key.float().permute(0, 2, 3, 1)
    received = query.new_zeros(query.shape[0], tokens, dtype=torch.float32)
    for start in range(0, tokens, _QUERY_BLOCK):
        block = query[:, start : start + _QUERY_BLOCK].float().transpose(1, 2)
        received += (block @ key * scale).softmax(dim=-1).sum(dim=(1, 2))
    return received


def _received_by_head(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """As `_received`, for many keys: one head, and as many queries as a cache holds, at a time."""
    tokens = key.shape[1]
    received = query.new_zeros(1, tokens, dtype=torch.float32)
    for head in range(query.shape[2]):
        keys = key[0, :, head].float().contiguous()
        queries = query[0, :, head].float() * scale
        for block in queries.split(max(8, _LOGITS_AT_ONCE // tokens)):
            weights = block @ keys.T
            weights.sub_(weights.amax(dim=1, keepdim=True)).exp_()
            received += (1.0 / weights.sum(dim=1))[None] @ weights
    return received


def _of_each(attend: Attention, query: Tensor, key: Tensor, scale: float) -> Tensor:
    parts = zip(query.split(1), key.split(1), strict=True)
    return torch.cat([attend(*part, scale) for part in parts])


def _fused() -> Attention | None:
    try:
        from flashvlm_vllm.vision.received_kernel import received_attention_fused
    except ImportError:
        return None
    return received_attention_fused
