# SPDX-License-Identifier: Apache-2.0
"""Positions of kept tokens: ``kept``, as without pruning, or ``closed``, consecutive."""

from enum import StrEnum

VISUAL_POSITIONS = "visual_positions"
"""Name of the field in requests, flags and processor arguments."""


class VisualPositions(StrEnum):
    """Positions of the tokens of a pruned prompt."""

    KEPT = "kept"
    """The positions without pruning: dropped tokens leave a gap."""
    CLOSED = "closed"
    """Consecutive positions, as in the released LLaVA code."""


ALLOWED = " or ".join(repr(str(each)) for each in VisualPositions)


def parse_positions(value: object) -> VisualPositions | None:
    """Check the value of a request field, a flag or a processor argument.

    Args:
        value: ``None`` (the default applies) or one of the two names.

    Raises:
        ValueError: the value is neither; the message names the two.

    """
    if value is None:
        return None
    if isinstance(value, str) and value in tuple(VisualPositions):
        return VisualPositions(value)
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise ValueError(f"visual positions are {ALLOWED}; got {shown}")
