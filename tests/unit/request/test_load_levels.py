# SPDX-License-Identifier: Apache-2.0
"""Budgets under load."""

import pytest

from flashvlm_vllm.request.load_levels import LoadLevel, budget_at, parse_load_levels


def test_the_highest_exceeded_level_applies() -> None:
    levels = parse_load_levels(["32:100", "0.5:0", "64:8"])
    assert levels == (LoadLevel(0, 0.5), LoadLevel(8, 64), LoadLevel(100, 32))
    expected = {0: None, 1: 0.5, 8: 0.5, 9: 64, 100: 64, 101: 32, 10**6: 32}
    assert {waiting: budget_at(levels, waiting) for waiting in expected} == expected
    assert parse_load_levels(None) == ()


@pytest.mark.parametrize(
    "texts",
    ["64:8", 5, ["64"], [64], ["64:"], [":8"], ["64:-1"], ["0:8"], ["null:8"], ["64:8:9"]],
)
def test_another_form_is_refused(texts: object) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_load_levels(texts)


def test_two_levels_for_one_number_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 8 waiting"):
        parse_load_levels(["64:8", "32:8"])
