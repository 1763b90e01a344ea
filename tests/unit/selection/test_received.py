# SPDX-License-Identifier: Apache-2.0
"""Attention in torch: blocks of queries and the other images of a batch make no difference."""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.vision.attention import Attention, cls_attention, received_attention


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_it_is_the_column_sum_of_the_map(tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, 3, tokens, 2, 10, generator=random).unbind()
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(received_attention(query, key, 0.3), weights.sum(dim=(1, 2)))


@pytest.mark.parametrize("attend", [cls_attention, received_attention])
@pytest.mark.parametrize("tokens", [25, 257, 577])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_computed_alike_in_any_batch(
    attend: Attention, tokens: int, heads: int, dtype: torch.dtype
) -> None:
    """To the last bit: a server under load has to keep the tokens that a quiet one keeps."""
    random = torch.Generator().manual_seed(tokens)
    states = torch.randn(2, 5, tokens, heads, 16, generator=random).to(dtype)
    alone = [
        attend(*(each[None].clone() for each in pair), 0.25)[0]
        for pair in zip(*states, strict=True)
    ]
    for count in range(1, 6):
        together = attend(*states[:, :count].clone(), 0.25)
        assert torch.equal(together, torch.stack(alone[:count]))
