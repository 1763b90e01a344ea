# SPDX-License-Identifier: Apache-2.0
"""Which positions kept tokens have: ``kept`` as without pruning, or ``closed`` up."""

from enum import StrEnum

VISUAL_POSITIONS = "visual_positions"
"""The name under which requests, flags and processor arguments carry it."""


class VisualPositions(StrEnum):
    """Where the tokens of a pruned prompt stand."""

    KEPT = "kept"
    """Where they stand without pruning: what is dropped leaves a gap."""
    CLOSED = "closed"
    """One after another, as in the released LLaVA code."""


ALLOWED = " or ".join(repr(str(each)) for each in VisualPositions)


def parse_positions(value: object) -> VisualPositions | None:
    """Check what a request, a flag or a processor argument says.

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
