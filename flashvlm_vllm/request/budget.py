# SPDX-License-Identifier: Apache-2.0
"""The visual budget: how it is parsed, and how many tokens it keeps. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from flashvlm_vllm.request.choices import shown

Budget = int | float
"""A number of tokens per image or video (an ``int``, 1 or more), or a fraction of its tokens (a
``float`` strictly between 0 and 1)."""

BUDGET = "visual_budget"
"""Name of the field in requests, flags and processor arguments."""

ALLOWED = (
    "a whole number of tokens per image or video (1 or more), a fraction strictly between 0 and 1, "
    "or null for no pruning"
)
_OFF_WORDS = frozenset({"null", "none", "off"})


def parse_budget(value: object, allowed: str = ALLOWED) -> Budget | None:
    """Check a budget of one item that arrived as JSON or as a Python value.

    Args:
        value: ``None``, an ``int`` or a ``float``; anything else is refused.
        allowed: what the error message says is allowed.

    Returns:
        The budget, or ``None`` when pruning is off.

    Raises:
        ValueError: the value is not a budget; the message says what is allowed.

    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a visual budget is {allowed}; got {shown(value)}")
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"a visual budget is {allowed}; got {shown(value)}")
        return value
    if value == 1.0:
        # JavaScript serializes 1.0 as 1, so the same literal would mean "all tokens" in one
        # client and "one token" in another.
        raise ValueError(
            "1.0 is ambiguous as a visual budget, because JavaScript writes it as 1: "
            "say 1 to keep one token per image or video, or null to keep them all"
        )
    if not math.isfinite(value) or not 0.0 < value < 1.0:
        raise ValueError(f"a visual budget is {allowed}; got {shown(value)}")
    return value


def parse_budget_text(text: object, allowed: str = ALLOWED) -> Budget | None:
    """Check a budget of one item written as text (command line, OpenAI ``metadata`` values).

    ``"64"`` is tokens, ``"0.25"`` a fraction, ``"null"``, ``"none"`` and ``"off"`` turn
    pruning off. The error message says what is ``allowed``.

    Raises:
        ValueError: the text is not a budget; the message says what is allowed.

    """
    if not isinstance(text, str):
        raise ValueError(f"a visual budget in text form is a string; got {shown(text)}")
    word = text.strip().lower()
    if word in _OFF_WORDS:
        return None
    # int() and float() also take "6_4" and digits of other scripts; only ASCII digits are a budget.
    if word.isascii() and word.isdigit() and len(word) <= 32:
        return parse_budget(int(word), allowed)
    try:
        number = float(word) if word.isascii() and "_" not in word else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"a visual budget is {allowed}; got {shown(text)}")
    return parse_budget(number, allowed)


def kept_tokens(
    total: int, budget: Budget | None, prunable: int | None = None, floor: int = 1
) -> int:
    """Return the number of visual tokens of one image or video that are kept.

    Args:
        total: visual tokens of the item without pruning (1 or more).
        budget: a checked budget, or ``None`` for no pruning.
        prunable: number of tokens that the selection chooses from; the others (LLaVA-NeXT's row
            newlines) are removed from every pruned image. Default: all.
        floor: fewest tokens kept, one per time step of a video; a lower budget is raised to it.

    Returns:
        ``total`` if the budget is not smaller than the item, else at most ``prunable`` tokens. A
        fraction is taken of ``total``, rounded half up, and keeps at least one token.

    """
    if budget is None:
        return total
    tokens = budget if isinstance(budget, int) else math.floor(total * budget + 0.5)
    tokens = max(floor, tokens)
    if tokens >= total:
        return total
    return min(tokens, total if prunable is None else prunable)


def spread_budget(budget: int, sizes: Sequence[int]) -> list[int]:
    """Divide a budget over crops in proportion to their numbers of patches.

    With equal crops every crop gets T/5, as in the LLaVA-NeXT protocol of VisPruner. With other
    aspect ratios, a tile that the edge of the image cuts off gets a share of its remaining patches.
    Tokens left over by rounding go to the largest remainders, and to the earlier crop (the base
    crop first) if remainders are equal.

    Args:
        budget: number of tokens to divide, 1 to ``sum(sizes)``.
        sizes: number of patches of each crop.

    Returns:
        Tokens per crop, each between 0 and its size, ``budget`` in total.

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
    """Number of visual tokens of one image or video without pruning, and limits of a budget."""

    total: int
    prunable: int
    """Number of tokens that the selection chooses from."""
    floor: int = 1
    """The smallest budget: one token per time step of a video."""

    def kept(self, budget: Budget | None) -> int:
        """Return the number of tokens that ``budget`` keeps."""
        return kept_tokens(self.total, budget, self.prunable, self.floor)


Counts = Mapping[str, Sequence[TokenCount | None]]
"""Token counts by modality, one per item; ``None`` if the item's size is not known."""


class BudgetSource(StrEnum):
    """Where the budget of an image or video is from."""

    REQUEST = "request"
    """The request, or the item's content part."""
    DEFAULT = "default"
    """``--visual-budget``."""
    UNDER_LOAD = "under_load"
    """``--visual-budget-under-load``."""


class Clamp(StrEnum):
    """The limit of the server that replaced a budget."""

    MIN = "min"
    """``--visual-budget-min``."""
    MAX = "max"
    """``--visual-budget-max``."""


class ItemCount(NamedTuple):
    """Visual tokens of one image or video before and after selection."""

    total: int
    kept: int
    modality: str = "image"
    source: BudgetSource | None = None
    """Where its budget is from; ``None``: it has none."""
    selector: str | None = None
    """The selector that applies, if it has a budget."""
    clamped: Clamp | None = None
    """Set if a limit of the server replaced the budget."""
