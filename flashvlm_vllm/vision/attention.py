# SPDX-License-Identifier: Apache-2.0
"""Attention weights, which fused kernels do not return, computed exactly from q and k.

On a CPU each image is computed separately. A matrix product over several images has another shape,
which BLAS may round differently, and for nearly equal scores the last bits decide which tokens
Algorithm 1 keeps. The kept tokens of an image would then depend on the server's load. On a CPU this
has no cost; on a GPU, where kernel launches would dominate, images are computed together.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, float], Tensor]

MOST_QUERIES: Final = 4096
"""Most tokens that are all used as queries. Of more tokens `SAMPLED` are used: the time for all
would grow with the square of their number, and be that of several layers of the tower."""
SAMPLED: Final = 1024
"""Number of queries sampled from a larger image."""
_QUERY_BLOCK = 128
"""Queries computed at once, instead of the full attention matrix."""
_LOGITS_AT_ONCE = 2**20
"""Logits of one head computed at once for a larger image: 4 MiB of float32 fit in a core's cache.
"""
_GOLDEN = (5**0.5 - 1) / 2


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the attention of the CLS token (position 0), summed over heads.

    A custom kernel would not help: one query per head reads every key once, O(T d), in a few kernel
    launches, while a layer of the tower takes dozens.

    Args:
        query, key: ``(B, T, H, d)``, any float dtype; weights are computed in float32.
        scale: factor on the logits, usually ``1 / sqrt(d)``.

    Returns:
        ``(B, T)`` float32, CLS included; divide by the number of heads for the mean of eq. 1.

    """
    return _cls(query, key, scale) if query.is_cuda else _of_each(_cls, query, key, scale)


def _cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float()) * scale
    return logits.softmax(dim=-1).sum(dim=1)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the attention that each token receives from all tokens, summed over queries and heads.

    For towers without CLS (the released Qwen code's version of eq. 1). With more than
    `MOST_QUERIES` tokens it is estimated from `SAMPLED` evenly spread queries. On CUDA, with triton
    installed, two fused kernels compute it; otherwise it is computed image by image, in blocks of
    queries.

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
    """Return one query from each of ``count`` equal intervals, ``(count,)`` int64, ascending.

    The offset in the interval follows the golden ratio. With a constant offset the queries could
    all be the same patch of a merged square, or the same column of a row.
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
    """Like `_received`, for many keys: one head and a cache-sized block of queries at a time."""
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
