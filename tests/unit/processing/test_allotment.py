# SPDX-License-Identifier: Apache-2.0
"""Budgets of items, from the request, its content parts and the server."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from flashvlm_vllm.processing.allotment import allot, fitted, must_fit
from flashvlm_vllm.request.budget import BudgetSource, Clamp, TokenCount
from flashvlm_vllm.request.parts import ItemSettings, PromptItems
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Refusal
from flashvlm_vllm.request.request_budget import (
    FitBudget,
    TotalBudget,
    largest_that_fits,
    shares_of_total,
)
from flashvlm_vllm.settings import ServerSettings

COUNTS = {"image": [TokenCount(576, 576), TokenCount(100, 100)], "video": [TokenCount(40, 40, 4)]}
COUNT = st.builds(
    lambda prunable, extra, floor: TokenCount(prunable + extra, prunable, min(floor, prunable)),
    st.integers(1, 3000),
    st.integers(0, 80),
    st.integers(1, 16),
)


def budgets(request: VisualRequest, settings: ServerSettings | None = None) -> list[Any]:
    found = allot(request, settings or ServerSettings(), COUNTS)
    return [each.budget for own in found.values() for each in own]


def sources(request: VisualRequest, settings: ServerSettings | None = None) -> list[Any]:
    found = allot(request, settings or ServerSettings(), COUNTS)
    return [each.source for own in found.values() for each in own]


def test_the_part_precedes_the_request_and_the_request_precedes_the_server() -> None:
    server = ServerSettings(budget=32, selector="uniform")
    parts = {"image": (ItemSettings(True, 8, selector="divprune"), ItemSettings(True, None))}
    assert budgets(VisualRequest(), server) == [32, 32, 32]
    assert budgets(VisualRequest(True, 64), server) == [64, 64, 64]
    assert budgets(VisualRequest(True, None), server) == [None, None, None]
    assert budgets(VisualRequest(True, 64, items=PromptItems(parts)), server) == [8, None, 64]
    request = VisualRequest(items=PromptItems(parts))
    assert budgets(request, server) == [8, None, 32]
    own = [BudgetSource.REQUEST] * 2
    assert sources(request, server) == [*own, BudgetSource.DEFAULT]
    chosen = allot(request, server, COUNTS)
    assert [each.selector for each in chosen["image"]] == ["divprune", "uniform"]


def test_settings_for_another_number_of_items_are_refused() -> None:
    with pytest.raises(Refusal, match="have 1 image parts, the prompt has 2"):
        budgets(VisualRequest(items=PromptItems({"image": (ItemSettings(True, 8),)})))


def test_limits_replace_what_a_request_asks_for_but_not_the_default() -> None:
    limits = {"budget_min": 0.1, "budget_max": 64}
    server = ServerSettings(budget=500, **limits)  # type: ignore[arg-type]
    assert budgets(VisualRequest(), server) == [500, 500, 500]
    assert budgets(VisualRequest(True, 1), server) == [0.1, 0.1, 1]  # 58, 10, and 4 time steps
    assert budgets(VisualRequest(True, 60), server) == [60, 60, 60]
    # No pruning asks for all tokens.
    assert budgets(VisualRequest(True, None), server) == [64, 64, None]
    found = allot(VisualRequest(True, None), server, COUNTS)["image"]
    assert [each.clamped for each in found] == [Clamp.MAX, Clamp.MAX]
    found = allot(VisualRequest(True, 1), server, COUNTS)["image"]
    assert [each.clamped for each in found] == [Clamp.MIN, Clamp.MIN]


def test_under_load_the_smaller_budget_applies_to_items_without_one() -> None:
    loaded = VisualRequest(under_load=16)
    assert budgets(loaded) == [16, 16, 16]
    assert set(sources(loaded)) == {BudgetSource.UNDER_LOAD}
    assert budgets(loaded, ServerSettings(budget=8)) == [8, 8, 8]
    assert set(sources(loaded, ServerSettings(budget=8))) == {BudgetSource.DEFAULT}
    parts = {"image": (ItemSettings(True, 99), ItemSettings(True, None))}
    assert budgets(VisualRequest(under_load=16, items=PromptItems(parts))) == [99, None, 16]


def test_a_total_is_divided_over_the_items_without_a_budget_of_their_own() -> None:
    assert sum(budgets(VisualRequest(True, TotalBudget(90)))) == 90
    parts = {"image": (ItemSettings(True, None), ItemSettings())}
    first, *others = budgets(VisualRequest(True, TotalBudget(90), items=PromptItems(parts)))
    assert first is None and sum(others) == 90
    with pytest.raises(Refusal, match=r"a total of 5 tokens is too small for 3.*smallest.* is 6"):
        budgets(VisualRequest(True, TotalBudget(5)))
    # As the server's default it is raised.
    assert budgets(VisualRequest(), ServerSettings(budget=TotalBudget(5))) == [1, 1, 4]


@given(st.lists(COUNT, min_size=1, max_size=8), st.integers(0, 30_000))
def test_shares_of_a_total_are_exact(counts: list[TokenCount], extra: int) -> None:
    tokens = sum(each.floor for each in counts) + extra
    shares = shares_of_total(tokens, counts)
    assert all(
        each.floor <= share <= each.total for each, share in zip(counts, shares, strict=True)
    )
    kept = [each.kept(share) for each, share in zip(counts, shares, strict=True)]
    assert kept == shares
    assert sum(kept) <= tokens
    if tokens <= sum(each.prunable for each in counts):
        assert sum(kept) == tokens
    if tokens >= sum(each.total for each in counts):
        assert kept == [each.total for each in counts]


def test_a_larger_image_gets_a_larger_share() -> None:
    assert shares_of_total(90, [TokenCount(576, 576), TokenCount(288, 288)]) == [60, 30]


@given(st.lists(COUNT, min_size=1, max_size=8), st.integers(0, 30_000))
def test_the_largest_budget_that_fits_is_the_largest(counts: list[TokenCount], room: int) -> None:
    def kept(budget: int) -> int:
        return sum(each.kept(budget) for each in counts)

    budget = largest_that_fits(room, counts)
    if budget is None:
        assert kept(1) > room
        return
    assert kept(budget) <= room
    assert kept(budget + 1) > room or budget == max(each.total for each in counts)


def fit(length: int, answer: int | None, context: int, **settings: Any) -> list[Any]:
    request = VisualRequest(True, FitBudget.FIT, answer=answer)
    server = ServerSettings(**settings)
    assert must_fit(request, server)
    start = allot(request, server, COUNTS)
    found = fitted(start, COUNTS, request, server, length, context)
    return [each.budget for own in found.values() for each in own]


def test_a_prompt_that_fits_is_not_pruned() -> None:
    assert fit(800, 200, 1000) == [None, None, None]
    assert fit(999, None, 1000) == [None, None, None]  # as stock vLLM accepts it


def test_a_longer_prompt_is_pruned_until_prompt_and_answer_fit() -> None:
    # 716 visual tokens and 84 of text.
    assert fit(800, 201, 1000) == [575, 575, 575]
    assert fit(800, 16, 200) == [33, 33, 33]  # (200 - 16 - 84) / 3
    assert fit(800, None, 400) == [88, 88, 88]  # a quarter for the answer: 216 = 88 + 88 + 40
    assert fit(800, 90, 180) == [1, 1, 4]
    with pytest.raises(Refusal, match="even the smallest budget does not fit") as caught:
        fit(800, 91, 180)
    assert caught.value.reason == "does_not_fit"


def test_limits_apply_to_a_budget_that_fits() -> None:
    assert fit(84 + 140, 16, 400, budget_max=50) == [50, 50, None]
    assert fit(84 + 140, 16, 200, budget_max=50) == [33, 33, 33]
    with pytest.raises(Refusal, match="does not fit"):
        fit(800, 16, 200, budget_min=50)


def test_items_with_a_budget_of_their_own_are_not_changed_to_fit() -> None:
    parts = {"image": (ItemSettings(True, 50), ItemSettings(True, None))}
    request = VisualRequest(True, FitBudget.FIT, items=PromptItems(parts), answer=10)
    server = ServerSettings()
    start = allot(request, server, COUNTS)
    found = fitted(start, COUNTS, request, server, 200, 200)
    assert [each.budget for own in found.values() for each in own] == [50, None, 30]
