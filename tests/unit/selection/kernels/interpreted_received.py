# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for attention received against the whole attention map, in Triton's interpreter.

``test_kernels.py`` runs this file in a separate process, like the kernel of the rounds.
"""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.vision.received_kernel import received_attention_fused


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(1, 64, 1, 64), (2, 77, 3, 72), (1, 130, 2, 80), (3, 1, 2, 16), (1, 65, 2, 8)],
)
# The interpreter multiplies the bits of bfloat16 as integers; ``tests/gpu`` tests that type.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_return_the_column_sums_of_the_attention_map(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(tokens)
    # As in a vision tower: three views of one projection.
    packed = 2 * torch.randn(batch, tokens, 3, heads, width, generator=random)
    query, key, _ = packed.to(dtype).unbind(dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * width**-0.5
    expected = logits.softmax(dim=-1).sum(dim=(1, 2))
    received = received_attention_fused(query, key, width**-0.5)
    torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-5)
    # The weights of every query sum to exactly 1 per head.
    torch.testing.assert_close(
        received.sum(dim=1), torch.full((batch,), float(heads * tokens)), rtol=1e-5, atol=0
    )


def test_logits_far_from_zero_do_not_overflow() -> None:
    query = torch.full((1, 70, 1, 16), 30.0)
    key = torch.linspace(-9, 9, 70)[None, :, None, None].expand(1, 70, 1, 16)
    received = received_attention_fused(query, key, 1.0)
    assert torch.isfinite(received).all()
    torch.testing.assert_close(received[0, -1], torch.tensor(70.0))


def test_any_memory_layout_is_accepted() -> None:
    query, key = torch.randn(2, 2, 16, 3, 50, generator=torch.Generator().manual_seed(0)).unbind()
    query, key = (each.permute(0, 3, 2, 1) for each in (query, key))
    torch.testing.assert_close(
        received_attention_fused(query, key, 0.2),
        received_attention_fused(query.contiguous(), key.contiguous(), 0.2),
    )


def test_fewer_queries_than_keys_are_accepted() -> None:
    random = torch.Generator().manual_seed(1)
    query = torch.randn(2, 70, 2, 24, generator=random)
    key = torch.randn(2, 150, 2, 24, generator=random)
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.2).softmax(dim=-1)
    torch.testing.assert_close(
        received_attention_fused(query, key, 0.2), weights.sum(dim=(1, 2)), rtol=1e-4, atol=1e-5
    )
