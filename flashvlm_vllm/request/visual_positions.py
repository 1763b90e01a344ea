# SPDX-License-Identifier: Apache-2.0
"""Positions of kept tokens: ``kept``, as without pruning, or ``closed``, consecutive."""

from enum import StrEnum

from flashvlm_vllm.request.choices import parse_choice

VISUAL_POSITIONS = "visual_positions"
"""Name of the field in requests, flags and processor arguments."""


class VisualPositions(StrEnum):
    """Positions of the tokens of a pruned prompt."""

    KEPT = "kept"
    """The positions without pruning: dropped tokens leave a gap."""
    CLOSED = "closed"
    """Consecutive positions, as in the released LLaVA code."""


def parse_positions(value: object) -> VisualPositions | None:
    """Check a value; errors as of `choices.parse_choice`."""
    return parse_choice(VisualPositions, "visual positions are", value)
