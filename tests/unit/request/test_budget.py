# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvlm_vllm.request.budget import TokenCount, kept_tokens, parse_budget, parse_budget_text


@pytest.mark.parametrize("value", [None, 1, 64, 10**30, 0.25, 1e-9, 0.999999])
def test_valid_budgets_are_returned_unchanged(value: object) -> None:
    assert parse_budget(value) == value


@pytest.mark.parametrize(
    "value",
    [0, -3, 0.0, -0.5, 1.5, 64.0, math.nan, math.inf, -math.inf, "64", True, False, [64], {}],
)
def test_invalid_budgets_are_refused_with_the_allowed_values(value: object) -> None:
    with pytest.raises(ValueError, match="fraction strictly between 0 and 1"):
        parse_budget(value)


def test_one_point_zero_is_refused_with_both_alternatives() -> None:
    with pytest.raises(ValueError, match=r"say 1 to keep one token per image or video, or null"):
        parse_budget(1.0)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("64", 64), (" 0.25 ", 0.25), ("null", None), ("None", None), ("off", None), (".5", 0.5)],
)
def test_budgets_are_parsed_from_text(text: str, budget: object) -> None:
    assert parse_budget_text(text) == budget


@pytest.mark.parametrize("text", ["", "abc", "1.0", "-3", "0", "nan", "inf", "6_4", "٤", 64, None])
def test_text_without_a_valid_budget_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="visual budget"):
        parse_budget_text(text)


@given(st.integers(1, 5000), st.one_of(st.integers(1, 10**30), st.floats(1e-6, 0.999999)))
def test_the_kept_count_is_between_one_and_total(total: int, budget: int | float) -> None:
    kept = kept_tokens(total, budget)
    assert 1 <= kept <= total
    if isinstance(budget, int):
        assert kept == min(total, budget)


def test_fractions_round_half_up_and_layout_tokens_are_dropped_when_pruned() -> None:
    assert kept_tokens(576, 0.25) == 144
    assert kept_tokens(10, 0.25) == 3
    assert kept_tokens(576, None) == 576
    assert kept_tokens(2928, 2900, prunable=2880) == 2880
    assert kept_tokens(2928, 2928, prunable=2880) == 2928


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(None, 64), (1, 8), (8, 8), (9, 9), (0.001, 8), (0.5, 32), (63, 63), (64, 64), (0.98, 63)],
)
def test_a_floor_raises_lower_budgets(budget: float | None, kept: int) -> None:
    assert TokenCount(64, 63, floor=8).kept(budget) == kept
