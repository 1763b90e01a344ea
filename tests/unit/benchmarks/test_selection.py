# SPDX-License-Identifier: Apache-2.0
"""Fits, intervals and targets of the selection benchmark, on known figures."""

import pytest
import torch

from benchmarks.selection import in_blocks, large_tower, selectors
from benchmarks.selection.answers import paired_difference
from benchmarks.selection.growth import growth_exponent
from benchmarks.selection.large_tower import Rates
from benchmarks.selection.sampled import all_queries, received_in_float64, shared
from benchmarks.selection.selectors import Cost, exponent_marks, exponents
from benchmarks.selection.synthetic import attention_inputs, grid_of, large_image
from flashvlm_vllm.selection import long_lists
from flashvlm_vllm.vision import attention


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    sizes = [576, 1024, 4096, 32768]
    assert growth_exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_the_exponent_is_a_least_squares_slope() -> None:
    # log2: 0, 1, 2 and 0, 3, 3; the slope is half of the difference of the ends.
    assert growth_exponent([1, 2, 4], [1, 8, 8]) == pytest.approx(1.5)


def test_an_exponent_needs_two_sizes_and_a_value_for_each() -> None:
    with pytest.raises(ValueError, match="two different sizes"):
        growth_exponent([8, 8], [1, 2])
    with pytest.raises(ValueError, match="1 values for 2 sizes"):
        growth_exponent([8, 16], [1])


def costs_of(name: str, power: float) -> list[Cost]:
    return [Cost(name, n, n**power, n**0.9, n**0.5) for n in selectors.COUNTS]


def test_targets_name_the_selectors_that_miss_them() -> None:
    costs = [*costs_of("slow", 1.5), *costs_of("quick", 1.0)]
    assert exponents(costs, "time", selectors.RANGES[0]) == pytest.approx(
        {"slow": 1.5, "quick": 1.0}
    )
    marks = exponent_marks(costs)
    assert len(marks) == len(selectors.MARKS) * len(selectors.RANGES)
    assert {mark.found for mark in marks if not mark.met} == {"1.50 (slow)"}
    assert {mark.found for mark in marks if mark.met} == {
        "at most 0.90 (slow)",
        "at most 0.50 (slow)",
    }


def test_the_cost_of_a_tower_is_the_sum_of_its_layers() -> None:
    rates = Rates(linear_ms=10.0, window_ms=2.0, full_ms=5.0)
    tokens = large_tower.MEASURED // large_tower.PATCHES
    windowed = large_tower.LAYERS - large_tower.FULL
    assert rates.tower_ms(tokens) == 32 * 10.0 + windowed * 2.0 + 4 * 5.0
    assert rates.full_attention_ms(3 * large_tower.MEASURED) == 9 * 5.0


def test_the_paired_difference_is_inside_its_interval() -> None:
    first = [True] * 60 + [False] * 40
    second = [True] * 50 + [False] * 50
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert 0.0 < found.low < 0.1 < found.high < 0.2
    alike = paired_difference(first, first)
    assert alike.low < alike.value == 0.0 < alike.high


def test_settings_changed_for_a_comparison_are_restored() -> None:
    before = long_lists.MOST_PAIRED, long_lists.BLOCK, attention.MOST_QUERIES
    with in_blocks.pairs_up_to(144, 36), all_queries():
        assert (long_lists.MOST_PAIRED, long_lists.BLOCK) == (144, 36)
        assert before[2] < attention.MOST_QUERIES
    assert before == (long_lists.MOST_PAIRED, long_lists.BLOCK, attention.MOST_QUERIES)


def test_all_queries_in_float64_equal_all_queries() -> None:
    query, key = attention_inputs(300, 2, 16, seed=0)
    expected = attention.received_attention(query, key, 0.25)[0]
    torch.testing.assert_close(received_in_float64(query, key, 0.25).float(), expected)


def test_objectives_hand_computed_examples() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    weight = torch.tensor([1.0, 2.0, 5.0])
    kept = torch.tensor([0, 1])
    assert in_blocks.log_determinant(features, weight, kept) == pytest.approx(
        2 * torch.tensor(2.0).log().item(), abs=1e-6
    )
    assert in_blocks.smallest_distance(features, torch.arange(3)) == pytest.approx(1 - 0.5**0.5)
    assert shared(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 9, 2, 7])) == 0.5


@pytest.mark.parametrize("count", [576, 2048, 6400])
def test_large_images_fill_their_grid(count: int) -> None:
    rows, columns = grid_of(count)
    assert rows * columns == count
    assert rows <= columns <= 2 * rows
    assert large_image(count, 32, seed=0).diversity.shape == (count, 32)
