# SPDX-License-Identifier: Apache-2.0
"""The geometric schedule: Algorithm 1 in blocks, a share of the list per round."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.selection.clock import TensorMemory
from flashvlm_vllm.selection import VIDEO, SelectionConfig, select_visual_tokens
from flashvlm_vllm.selection.blocks import remove_near_duplicates_in_blocks
from flashvlm_vllm.selection.partition import cosine_gram, remove_near_duplicates

from . import reference
from .conftest import assert_exact, make_image


def plain_loop(
    features: list[list[float]], keep: int, removed_fraction: float, block_length: int
) -> list[int]:
    """The rule of the function's docstring, with Python lists."""
    left = list(range(len(features)))
    while len(left) > keep:
        removed = min(max(1, int(removed_fraction * len(left))), len(left) - keep)
        blocks = -(-len(left) // block_length)
        after = []
        for number in range(blocks):
            block = left[number::blocks]
            less = removed // blocks + (number < removed % blocks)
            after += reference.algorithm_1_round(features, block, less)
        left = after
    return left


@settings(max_examples=120, deadline=None)
@given(
    count=st.integers(1, 60),
    data=st.data(),
    fraction=st.sampled_from([0.01, 0.125, 0.25, 1 / 3, 0.5]),
    block_length=st.integers(4, 40),
    seed=st.integers(0, 10_000),
)
def test_result_equals_the_plain_loop(
    count: int, data: st.DataObject, fraction: float, block_length: int, seed: int
) -> None:
    """Rows of +-1 in 16 dimensions: cosines are exact, and ties are frequent."""
    keep = data.draw(st.integers(1, count))
    random = torch.Generator().manual_seed(seed)
    features = torch.randint(0, 2, (count, 16), generator=random).float() * 2 - 1
    features[:, 5:] = features[:1, 5:]
    kept = remove_near_duplicates_in_blocks(features, keep, fraction, block_length)
    assert kept.tolist() == plain_loop(features.tolist(), keep, fraction, block_length)


@pytest.mark.parametrize("keep", [36, 40, 47, 48])
def test_one_block_and_one_round_is_algorithm_1(keep: int) -> None:
    features = make_image(48).diversity
    kept = remove_near_duplicates_in_blocks(features, keep, 0.25, 48)
    expected = remove_near_duplicates(cosine_gram(features), keep, max(48 - keep, 1))
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize("count", range(1, 51))
def test_every_budget_is_met_exactly(count: int, fraction: float) -> None:
    image = make_image(count)
    config = SelectionConfig(schedule="geometric", block_length=9, removed_fraction=fraction)
    for budget in {1, 2, count // 3 + 1, count - 1, count, count + 1} - {0}:
        kept = select_visual_tokens(
            image.features, image.saliency, image.text, budget, image.diversity, config
        )
        assert_exact(kept, budget, count)


@pytest.mark.parametrize(("count", "budget"), [(2049, 1), (3001, 333), (4096, 4095), (5000, 280)])
def test_thousands_of_tokens_give_the_exact_count(count: int, budget: int) -> None:
    image = make_image(count)
    kept = select_visual_tokens(
        image.features, image.saliency, image.text, budget, image.diversity, VIDEO
    )
    assert_exact(kept, budget, count)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_identical_tokens_are_removed_in_list_order(value: float) -> None:
    features = torch.full((50, 16), value)
    kept = remove_near_duplicates_in_blocks(features, 7, 0.25, 12)
    expected = plain_loop([[1.0]] * 50, 7, 0.25, 12)
    assert kept.tolist() == expected


def test_a_non_finite_token_has_zero_similarity() -> None:
    features = make_image(60).diversity
    features[[8, 21]] = math.nan
    zeros = features.nan_to_num(nan=0.0)
    assert torch.equal(
        remove_near_duplicates_in_blocks(features, 20, 0.25, 16),
        remove_near_duplicates_in_blocks(zeros, 20, 0.25, 16),
    )


def test_duplicates_are_removed_first_in_any_order() -> None:
    """Every token has a duplicate: half of the list can be removed without loss."""
    features = torch.eye(200).repeat(2, 1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    kept = order[remove_near_duplicates_in_blocks(features[order], 200, 0.1, 64)] % 200
    by_chance = 200 * (1 - 0.5**2)
    assert len(kept.unique()) > by_chance + 15


def test_the_schedule_is_deterministic_and_differs_from_the_published_one() -> None:
    image = make_image(1500)
    given = (image.features, image.saliency, image.text, 100, image.diversity)
    first, second = (select_visual_tokens(*given, VIDEO) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, select_visual_tokens(*given))


def memory_of(count: int, config: SelectionConfig) -> TensorMemory:
    image = make_image(count, width=32)
    memory = TensorMemory()
    with memory:
        select_visual_tokens(
            image.features, image.saliency, image.text, count // 9, image.diversity, config
        )
    return memory


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    short, long = (memory_of(count, VIDEO) for count in (4096, 16384))
    assert long.largest <= 4.2 * short.largest
    assert long.peak <= 4.2 * short.peak
    assert short.largest < 4096**2  # much less than a byte per pair


def test_the_memory_measurement_detects_quadratic_growth() -> None:
    short, long = (memory_of(count, SelectionConfig()) for count in (256, 1024))
    assert long.largest > 12 * short.largest
