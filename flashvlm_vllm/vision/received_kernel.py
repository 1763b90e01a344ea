# SPDX-License-Identifier: Apache-2.0
"""Attention received, as two Triton kernels that do not store the attention matrix.

The torch version is `received_attention`. The first kernel is half of flash attention: it computes
the log-sum-exp of every query's logits, by head. The second repeats the products and sums each
key's weights over the queries. ``flash_attn`` returns the log-sum-exp too, but it also multiplies
by values, which doubles the work of the first kernel; the tests use it as a reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    query,
    key,
    queries,
    keys,
    query_stride,
    key_stride,
    scale,
    asking,
    tokens,
    width,
    WIDTH: tl.constexpr,
):
    # Head sizes such as 72 and 80 are not powers of two: they are padded with zeros.
    dims = tl.arange(0, WIDTH)
    is_query = (queries < asking)[:, None] & (dims < width)[None, :]
    is_key = (keys < tokens)[None, :] & (dims < width)[:, None]
    left = tl.load(query + queries[:, None] * query_stride + dims[None, :], mask=is_query, other=0)
    right = tl.load(key + keys[None, :] * key_stride + dims[:, None], mask=is_key, other=0)
    # "ieee": float32 inputs are not rounded to tf32; 16-bit inputs are exact in any case.
    return tl.dot(left, right, input_precision="ieee") * scale


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum_exp(  # type: ignore[no-untyped-def]
    query,  # (B, Q, H, d), last dimension dense
    key,  # (B, T, H, d), last dimension dense
    totals,  # (B, H, Q) float32, output
    scale,
    asking,  # Q
    tokens,  # T
    heads,
    width,
    query_strides_0,
    query_strides_1,
    query_strides_2,
    key_strides_0,
    key_strides_1,
    key_strides_2,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    item = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query += item * query_strides_0 + head * query_strides_2
    key += item * key_strides_0 + head * key_strides_2
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tokens, KEYS):
        keys = start + tl.arange(0, KEYS)
        logits = _logits(
            query,
            key,
            queries,
            keys,
            query_strides_1,
            key_strides_1,
            scale,
            asking,
            tokens,
            width,
            WIDTH,
        )
        logits = tl.where((keys < tokens)[None, :], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        highest = higher
    place = (item * heads + head) * asking + queries
    tl.store(totals + place, highest + tl.log(total), mask=queries < asking)


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    query,
    key,
    totals,  # (B, H, Q) float32 from `_log_sum_exp`
    received,  # (B, H, T) float32, output
    scale,
    asking,
    tokens,
    heads,
    width,
    query_strides_0,
    query_strides_1,
    query_strides_2,
    key_strides_0,
    key_strides_1,
    key_strides_2,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    item = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query += item * query_strides_0 + head * query_strides_2
    key += item * key_strides_0 + head * key_strides_2
    row = item * heads + head
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((KEYS,), tl.float32)
    for start in range(0, asking, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        logits = _logits(
            query,
            key,
            queries,
            keys,
            query_strides_1,
            key_strides_1,
            scale,
            asking,
            tokens,
            width,
            WIDTH,
        )
        # Queries beyond the end add exp(-inf) = 0.
        sums = tl.load(totals + row * asking + queries, mask=queries < asking, other=float("inf"))
        total += tl.sum(tl.exp(logits - sums[:, None]), axis=0)
    tl.store(received + row * tokens + keys, total, mask=keys < tokens)


def received_attention_fused(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the attention that each key receives from all queries, computed on a GPU.

    Takes O(B H T) memory and is deterministic.

    Args:
        query: ``(B, Q, H, d)``, any float dtype; products are summed in float32.
        key: ``(B, T, H, d)`` of the same dtype.
        scale: factor on the logits.

    Returns:
        ``(B, T)`` float32, summed over queries and heads.

    """
    query, key = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key))
    batch, asking, heads, width = query.shape
    tokens = key.shape[1]
    totals = torch.empty(batch, heads, asking, device=query.device)
    received = torch.empty(batch, heads, tokens, device=query.device)
    sizes = (scale, asking, tokens, heads, width, *query.stride()[:3], *key.stride()[:3])
    block = 64
    # tl.dot needs at least 16.
    blocks = {"QUERIES": block, "KEYS": block, "WIDTH": max(16, triton.next_power_of_2(width))}
    items = batch * heads
    _log_sum_exp[(triton.cdiv(asking, block), items)](query, key, totals, *sizes, **blocks)
    _column_sums[(triton.cdiv(tokens, block), items)](
        query, key, totals, received, *sizes, **blocks
    )
    # The kernel writes one sum per head: atomic additions would not be deterministic.
    return received.sum(dim=1)
