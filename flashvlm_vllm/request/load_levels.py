# SPDX-License-Identifier: Apache-2.0
"""Smaller budgets while requests wait, as ``--visual-budget-under-load`` gives them."""

from collections.abc import Iterable
from typing import NamedTuple

from flashvlm_vllm.request.budget import Budget, parse_budget_text
from flashvlm_vllm.request.choices import shown

ALLOWED = "BUDGET:WAITING, such as 64:8 for 64 tokens while more than 8 requests wait"


class LoadLevel(NamedTuple):
    """The budget of requests without one while more than ``waiting`` requests wait."""

    waiting: int
    budget: Budget


def parse_load_level(text: object) -> LoadLevel:
    """Check one level, ``BUDGET:WAITING``.

    Raises:
        ValueError: the text has another form; the message says what is allowed.

    """
    budget_text, _, waiting = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (waiting.isascii() and waiting.isdigit() and len(waiting) <= 9):
        raise ValueError(f"a budget under load is {ALLOWED}; got {shown(text)}")
    budget = parse_budget_text(budget_text)
    if budget is None:
        raise ValueError(f"a budget under load is {ALLOWED}; got {shown(text)}")
    return LoadLevel(int(waiting), budget)


def parse_load_levels(texts: object) -> tuple[LoadLevel, ...]:
    """Check several levels; ``None`` means none.

    Returns:
        The levels by ascending number of waiting requests.

    Raises:
        ValueError: a level has another form, or two have the same number of waiting requests.

    """
    if texts is None:
        return ()
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"budgets under load are a list of {ALLOWED}; got {shown(texts)}")
    levels = sorted(parse_load_level(each) for each in texts)
    numbers = [each.waiting for each in levels]
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"two budgets under load are for more than {number} waiting requests")
    return tuple(levels)


def budget_at(levels: Iterable[LoadLevel], waiting: int) -> Budget | None:
    """Return the budget of the highest level that is exceeded; ``None`` if none is.

    Args:
        levels: by ascending number of waiting requests.
        waiting: number of requests that wait.

    """
    budget = None
    for each in levels:
        if waiting > each.waiting:
            budget = each.budget
    return budget
