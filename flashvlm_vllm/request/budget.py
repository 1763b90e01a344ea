# SPDX-License-Identifier: Apache-2.0
"""What a visual budget is, and how many tokens it keeps. Pure functions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Budget = int | float
"""Whole tokens per image or video (an ``int`` of 1 or more), or a fraction strictly between 0 and
1."""

BUDGET = "visual_budget"
"""The name under which requests, flags and processor arguments carry it."""

ALLOWED = (
    "a whole number of tokens per image or video (1 or more), a fraction strictly between 0 and 1, "
    "or null for no pruning"
)
_OFF_WORDS = frozenset({"null", "none", "off"})


def parse_budget(value: object) -> Budget | None:
    """Check a budget that arrived as JSON or as a Python value.

    Args:
        value: ``None``, an ``int`` or a ``float``; anything else is refused.

    Returns:
        The budget, or ``None`` when pruning is off.

    Raises:
        ValueError: the value is not a budget; the message says what is allowed.

    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a visual budget is {ALLOWED}; got {_shown(value)}")
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"a visual budget is {ALLOWED}; got {_shown(value)}")
        return value
    if value == 1.0:
        # JavaScript writes 1.0 as 1: the same program text would mean "everything" in
        # one client and "one token" in another.
        raise ValueError(
            "1.0 is ambiguous as a visual budget, because JavaScript writes it as 1: "
            "say 1 to keep one token per image or video, or null to keep them all"
        )
    if not math.isfinite(value) or not 0.0 < value < 1.0:
        raise ValueError(f"a visual budget is {ALLOWED}; got {_shown(value)}")
    return value


def parse_budget_text(text: object) -> Budget | None:
    """Check a budget written as text (command line, OpenAI ``metadata`` values).

    ``"64"`` is tokens, ``"0.25"`` a fraction, ``"null"``, ``"none"`` and ``"off"`` turn
    pruning off.

    Raises:
        ValueError: the text is not a budget; the message says what is allowed.

    """
    if not isinstance(text, str):
        raise ValueError(f"a visual budget in text form is a string; got {_shown(text)}")
    word = text.strip().lower()
    if word in _OFF_WORDS:
        return None
    # int() and float() also take "6_4" and digits of other scripts; only ASCII digits are a budget.
    if word.isascii() and word.isdigit() and len(word) <= 32:
        return parse_budget(int(word))
    try:
        number = float(word) if word.isascii() and "_" not in word else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"a visual budget is {ALLOWED}; got {_shown(text)}")
    return parse_budget(number)


def kept_tokens(
    total: int, budget: Budget | None, prunable: int | None = None, floor: int = 1
) -> int:
    """Tell how many visual tokens of one image or video stay.

    Args:
        total: visual tokens of the item without pruning (1 or more).
        budget: a checked budget, or ``None`` for no pruning.
        prunable: how many of them the selection may choose from; the others (LLaVA-NeXT's
            row newlines) are layout and go as soon as the image is pruned. Default: all.
        floor: the fewest that stay, one per time step of a video; a lower budget is raised to it.

    Returns:
        ``total`` when the budget does not bind, else at most ``prunable`` tokens. A fraction
        is taken of ``total``, rounded half up, and keeps at least one token.

    """
    if budget is None:
        return total
    tokens = budget if isinstance(budget, int) else math.floor(total * budget + 0.5)
    tokens = max(floor, tokens)
    if tokens >= total:
        return total
    return min(tokens, total if prunable is None else prunable)


def spread_budget(budget: int, sizes: Sequence[int]) -> list[int]:
    """Share a budget over crops in proportion to their patches.

    With equal crops this is the T/5 each of the LLaVA-NeXT protocol (VisPruner); for other
    aspect ratios a tile cut by the picture's edge gets what its remaining patches are worth.
    What rounding leaves goes to the largest remainders, the earlier crop (the base) first.

    Args:
        budget: tokens to share, 1 to ``sum(sizes)``.
        sizes: patches of each crop.

    Returns:
        tokens per crop, each between 0 and its size, ``budget`` in total.

    """
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(
        range(len(sizes)), key=lambda crop: budget * sizes[crop] % total, reverse=True
    )
    for crop in by_remainder[: budget - sum(shares)]:
        shares[crop] += 1
    return shares


class TokenCount(NamedTuple):
    """Visual tokens of one image or video without pruning, and what a budget may do to them."""

    total: int
    prunable: int
    """Those the selection may choose from."""
    floor: int = 1
    """The smallest budget: one token per time step of a video."""

    def kept(self, budget: Budget | None) -> int:
        """Tell how many stay."""
        return kept_tokens(self.total, budget, self.prunable, self.floor)


class ItemCount(NamedTuple):
    """What one image or video cost."""

    total: int
    kept: int
    modality: str = "image"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
