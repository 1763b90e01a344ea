# SPDX-License-Identifier: Apache-2.0
"""The order of turns in a round."""

from collections.abc import Sequence
from typing import TypeVar

Turn = TypeVar("Turn")


def alternating(turns: Sequence[Turn], round_: int) -> list[Turn]:
    """Return the turns forwards in even rounds and backwards in odd ones."""
    return list(turns[::-1] if round_ % 2 else turns)


def rotated(turns: Sequence[Turn], round_: int) -> list[Turn]:
    """Begin one turn later in each round: over as many rounds, each is in each place once."""
    place = round_ % len(turns)
    return [*turns[place:], *turns[:place]]
