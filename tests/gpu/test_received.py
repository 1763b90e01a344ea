# SPDX-License-Identifier: Apache-2.0
"""Attention received, by fused kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.vision import attention
from flashvlm_vllm.vision.attention import received_attention


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(1, 64, 1, 64), (2, 577, 16, 64), (3, 729, 16, 72), (1, 1025, 16, 80), (5, 1, 2, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_kernels_equal_the_torch_implementation(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    random = torch.Generator("cuda").manual_seed(tokens)
    packed = torch.randn(batch, tokens, 3, heads, width, generator=random, device="cuda")
    query, key, _ = packed.to(dtype).unbind(dim=2)
    expected = attention._received(query, key, width**-0.5)
    received = received_attention(query, key, width**-0.5)
    torch.testing.assert_close(received, expected, rtol=1e-3, atol=1e-4)


def test_the_attention_map_is_not_materialised() -> None:
    query, key = torch.randn(2, 1, 16384, 16, 64, device="cuda", dtype=torch.bfloat16).unbind()
    received_attention(query[:, :64], key[:, :64], 0.125)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    received_attention(query, key, 0.125)
    torch.cuda.synchronize()
    # Two numbers per head and token, plus the result.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 16 * 16384 * 4 + 2**20


def test_the_log_sum_exp_equals_that_of_flash_attention() -> None:
    flash_attn = pytest.importorskip("flash_attn")
    query, key = torch.randn(2, 2, 577, 16, 64, device="cuda", dtype=torch.bfloat16).unbind()
    _, totals, _ = flash_attn.flash_attn_func(
        query, key, key, softmax_scale=0.125, return_attn_probs=True
    )
    weights = (torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * 0.125) - totals[
        ..., None
    ]
    expected = weights.exp().sum(dim=(1, 2))
    torch.testing.assert_close(received_attention(query, key, 0.125), expected, rtol=1e-2, atol=0)
