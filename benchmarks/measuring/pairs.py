# SPDX-License-Identifier: Apache-2.0
"""Two measured things, compared pair by pair; with the interval of ``benchmarks.idle.ratios``."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.idle.ratios import FEWEST_ROUNDS, interval


@dataclass(frozen=True)
class Compared:
    """Ratios of pairs that were measured one right after the other."""

    pairs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The ratio to quote."""
        return statistics.median(self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the median; None where there are too few pairs for one."""
        return interval(self.pairs) if len(self.pairs) >= FEWEST_ROUNDS else None

    def __format__(self, spec: str) -> str:
        """As tables show it: ``spec``, else two digits, for the median and the interval's ends."""
        spec = spec or ".2f"
        ends = self.interval
        shown = f" ({ends[0]:{spec}} to {ends[1]:{spec}})" if ends else ""
        return f"{self.median:{spec}}{shown}"

    def __str__(self) -> str:
        """With two digits."""
        return format(self)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Compared:
    """Divide pair by pair.

    Raises:
        ValueError: they are not equally many, or none.
    """
    if not ours:
        raise ValueError("no pairs to compare")
    return Compared(tuple(a / b for a, b in zip(ours, theirs, strict=True)))
