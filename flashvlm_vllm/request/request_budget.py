# SPDX-License-Identifier: Apache-2.0
"""The budget of a whole request: one for each item, a total for all of them, or what fits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from flashvlm_vllm.request.budget import (
    ALLOWED,
    Budget,
    TokenCount,
    parse_budget,
    parse_budget_text,
    spread_budget,
)
from flashvlm_vllm.request.choices import shown

_TOTAL = "total"

ALLOWED_IN_REQUEST: Final = (
    f'{ALLOWED}; or {{"{_TOTAL}": tokens}} for all images and videos of the request together, or '
    '"fit" for as many tokens as the context has room for'
)


@dataclass(frozen=True)
class TotalBudget:
    """A number of tokens for all images and videos of a request without a budget of their own."""

    tokens: int
    """1 or more."""


class FitBudget(Enum):
    """The largest budget with which prompt and answer fit into the context."""

    FIT = "fit"


RequestBudget = Budget | TotalBudget | FitBudget
"""A budget as a request, its metadata or a flag may give it."""


def parse_request_budget(value: object) -> RequestBudget | None:
    """Check a request's budget that arrived as JSON or as a Python value.

    Args:
        value: as for `budget.parse_budget`; or ``{"total": tokens}``, or ``"fit"``.

    Raises:
        ValueError: the value is not a budget; the message says what is allowed.

    """
    if value == FitBudget.FIT.value:
        return FitBudget.FIT
    if not isinstance(value, Mapping):
        return parse_budget(value, ALLOWED_IN_REQUEST)
    tokens = value.get(_TOTAL)
    if set(value) != {_TOTAL} or isinstance(tokens, bool) or not isinstance(tokens, int):
        raise ValueError(f"a visual budget is {ALLOWED_IN_REQUEST}; got {shown(dict(value))}")
    if tokens < 1:
        raise ValueError(f"a total visual budget is 1 token or more; got {shown(tokens)}")
    return TotalBudget(tokens)


def parse_request_budget_text(text: object) -> RequestBudget | None:
    """Check a request's budget written as text (command line, ``metadata``, headers).

    As for `budget.parse_budget_text`; or ``fit``, or a total as JSON: ``{"total": 256}``.

    Raises:
        ValueError: the text is not a budget; the message says what is allowed.

    """
    word = text.strip() if isinstance(text, str) else ""
    if word.lower() == FitBudget.FIT.value:
        return FitBudget.FIT
    if word.startswith("{"):
        try:
            value = json.loads(word)
        except (ValueError, RecursionError):
            value = {}
        if value == {}:
            raise ValueError(f"a visual budget is {ALLOWED_IN_REQUEST}; got {shown(text)}")
        return parse_request_budget(value)
    return parse_budget_text(text, ALLOWED_IN_REQUEST)


def as_json(budget: RequestBudget | None) -> Any:
    """Return a budget as a JSON value, such as clients send it."""
    if isinstance(budget, TotalBudget):
        return {_TOTAL: budget.tokens}
    return budget.value if isinstance(budget, FitBudget) else budget


def shares_of_total(tokens: int, counts: Sequence[TokenCount]) -> list[int]:
    """Divide a total over items in proportion to their sizes, each at least its floor.

    Args:
        tokens: the total; at least the sum of the floors.
        counts: token counts of the items.

    Returns:
        Tokens per item: ``tokens`` in all, unless the items have fewer that can be kept.

    """
    if tokens >= sum(each.total for each in counts):
        return [each.total for each in counts]
    floors = [min(each.floor, each.prunable) for each in counts]
    room = [each.prunable - floor for each, floor in zip(counts, floors, strict=True)]
    rest = min(tokens - sum(floors), sum(room))
    if rest <= 0:
        return floors
    return [floor + share for floor, share in zip(floors, spread_budget(rest, room), strict=True)]


def largest_that_fits(room: int, counts: Sequence[TokenCount]) -> int | None:
    """Return the largest budget per item whose kept tokens fit.

    Args:
        room: number of tokens that all items together may have.
        counts: token counts of the items.

    Returns:
        Tokens per item; ``None`` if not even one each (a video: one per time step) fits.

    """

    def fits(budget: int) -> bool:
        return sum(each.kept(budget) for each in counts) <= room

    if not fits(1):
        return None
    low, high = 1, max((each.total for each in counts), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
