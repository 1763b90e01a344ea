# SPDX-License-Identifier: Apache-2.0
"""Attention received, in torch: blocks of queries and parts of a batch make no difference."""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.vision import attention
from flashvlm_vllm.vision.attention import received_attention


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_it_is_the_column_sum_of_the_map(tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, 3, tokens, 2, 10, generator=random).unbind()
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(received_attention(query, key, 0.3), weights.sum(dim=(1, 2)))


def test_a_large_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 5, 30, 2, 10, generator=torch.Generator().manual_seed(0)).unbind()
    whole = received_attention(query, key, 0.3)
    seen = []
    single = attention._received
    monkeypatch.setattr(attention, "_LOGITS", 2 * 2 * 30 * attention._QUERY_BLOCK)
    monkeypatch.setattr(
        attention, "_received", lambda q, k, scale: (seen.append(len(q)), single(q, k, scale))[1]
    )
    torch.testing.assert_close(received_attention(query, key, 0.3), whole)
    assert seen == [2, 2, 1]
