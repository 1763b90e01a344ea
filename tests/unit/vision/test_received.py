# SPDX-License-Identifier: Apache-2.0
"""Attention in torch: results do not depend on query blocks or on other images of a batch."""

from __future__ import annotations

import pytest
import torch

from flashvlm_vllm.vision.attention import (
    MOST_QUERIES,
    SAMPLED,
    Attention,
    cls_attention,
    received_attention,
    spread_queries,
)


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_attention_received_equals_the_column_sums_of_the_map(tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, 3, tokens, 2, 10, generator=random).unbind()
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(received_attention(query, key, 0.3), weights.sum(dim=(1, 2)))


@pytest.mark.parametrize("attend", [cls_attention, received_attention])
@pytest.mark.parametrize("tokens", [25, 257, 577])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_gives_identical_results_in_any_batch(
    attend: Attention, tokens: int, heads: int, dtype: torch.dtype
) -> None:
    """Bit for bit: the kept tokens must not depend on the load of the server."""
    random = torch.Generator().manual_seed(tokens)
    states = torch.randn(2, 5, tokens, heads, 16, generator=random).to(dtype)
    alone = [
        attend(*(each[None].clone() for each in pair), 0.25)[0]
        for pair in zip(*states, strict=True)
    ]
    for count in range(1, 6):
        together = attend(*states[:, :count].clone(), 0.25)
        assert torch.equal(together, torch.stack(alone[:count]))


def structured(tokens: int, heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries that vary slowly over an image and match a few kinds of keys."""
    random = torch.Generator().manual_seed(tokens)
    side = int(tokens**0.5)
    rows, columns = torch.arange(tokens) // side / side, torch.arange(tokens) % side / side
    waves = torch.stack([(a * rows + b * columns).sin() for a in range(1, 7) for b in range(1, 7)])
    mix = torch.randn(2, 36, heads * width, generator=random)
    query, key = (waves.T @ each / 3 for each in mix)
    key = key + torch.randn(tokens, 1, generator=random)
    return query.view(1, tokens, heads, width), key.view(1, tokens, heads, width)


def test_sampled_queries_are_spread_evenly_over_rows_columns_and_merged_squares() -> None:
    for tokens in (16_384, 20_000, 65_536):
        chosen = spread_queries(tokens, SAMPLED, torch.device("cpu"))
        assert len(chosen.unique()) == SAMPLED
        assert 0 <= int(chosen[0]) <= int(chosen[-1]) < tokens
        # Each patch of a merged square, and each range of columns, is sampled about equally often.
        for period in (4, 16, 64, 128):
            shares = torch.bincount(chosen % period, minlength=period).float()
            assert shares.std() < 0.9 * (SAMPLED / period) ** 0.5, (tokens, period)


@pytest.mark.parametrize("tokens", [4225, 9216])
def test_sampled_queries_give_nearly_the_same_result_for_many_tokens(tokens: int) -> None:
    assert tokens > MOST_QUERIES
    query, key = structured(tokens, 2, 16)
    weights = sum(
        (query[0, block].transpose(0, 1) @ key[0].permute(1, 2, 0) * 0.25)
        .softmax(dim=-1)
        .sum(dim=(0, 1))
        for block in torch.arange(tokens).split(512)
    )
    received = received_attention(query, key, 0.25)[0]
    torch.testing.assert_close(received.sum(), torch.tensor(2.0 * tokens), rtol=1e-4, atol=0)
    assert torch.corrcoef(torch.stack([received, weights]))[0, 1] > 0.99
    best = set(weights.topk(tokens // 16).indices.tolist())
    assert len(best & set(received.topk(tokens // 16).indices.tolist())) > 0.9 * len(best)


def test_a_large_image_gives_identical_results_in_any_batch() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4100, 2, 8, generator=random)
    together = received_attention(query, key, 0.25)
    alone = [
        received_attention(query[row : row + 1], key[row : row + 1], 0.25)[0] for row in range(3)
    ]
    assert torch.equal(together, torch.stack(alone))
