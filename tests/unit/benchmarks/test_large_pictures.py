# SPDX-License-Identifier: Apache-2.0
"""The targets of requests with a large image: the worst selector, and the median of all."""

from benchmarks.large_pictures.figures import Pair, Request, marks
from flashvlm_vllm.selection.registry import BUILT_IN

STOCK = Request(seconds=100.0, others=100.0, peak=1000.0)


def measured(**seconds: float) -> list[Pair]:
    """Return a pair for each selector, with 90 of stock's 100 seconds unless given."""
    names = ["no budget", *BUILT_IN]
    ours = {name: Request(seconds.get(name, 90.0), 100.0, 1000.0) for name in names}
    return [Pair("32 layers", name, ours[name], STOCK) for name in names]


def met(pairs: list[Pair]) -> list[bool | None]:
    return [mark.met for mark in marks(pairs)]


def test_one_slow_selector_misses_the_target_and_leaves_the_median() -> None:
    assert met(measured()) == [True, True, True, True]
    assert met(measured(flashvlm=101.0)) == [False, True, True, True]


def test_a_request_without_a_budget_is_not_judged() -> None:
    assert met(measured(**{"no budget": 200.0})) == [True, True, True, True]


def test_all_selectors_slower_miss_the_median_too() -> None:
    assert met(measured(**dict.fromkeys(BUILT_IN, 105.0)))[:2] == [False, False]


def test_memory_and_waiting_are_relative_to_the_stock_request_of_the_pair() -> None:
    greedy = Pair("32 layers", "random", Request(90.0, 121.0, 1513.0), STOCK)
    assert met([*measured(), greedy]) == [True, True, False, False]
    beside = Request(seconds=100.0, others=130.0, peak=1100.0)
    same = Pair("32 layers", "random", Request(90.0, 121.0, 1513.0), beside)
    assert met([*measured(), same]) == [True, True, True, True]
