# SPDX-License-Identifier: Apache-2.0
"""Compares two series of measurements pair by pair, with an interval.

**Interval.** The median of the n ratios, between the k-th smallest and the k-th largest of them:
the interval that a two-sided sign test at 5 % does not reject. The chance that all but k - 1 of n
rounds fall on one side of the true median is that of as many heads in n tosses, so k is the
largest number for which both tails together stay within 5 % (12 rounds: k = 3 and 96.1 %). It
assumes independent rounds and no distribution, and k - 1 disturbed rounds do not move it, however
disturbed they were. It covers rounds, not restarts: a difference between two server processes, such
as the placement of their memory, is the same in every round. A second stock server measures it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TOLERANCE: Final = 1.02
"""A cost of up to 2 % counts as none."""
CONFIDENCE: Final = 0.95
FEWEST_ROUNDS: Final = 6
"""With fewer, even the widest interval covers less than 95 %."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the interval that covers the median with at least 95 %."""
    count = len(values)
    if count < FEWEST_ROUNDS:
        raise ValueError(f"{count} rounds make no 95 % interval; {FEWEST_ROUNDS} do")
    tail, cut = 1, 0  # tail: in how many of 2**count tosses there are at most `cut` heads.
    while 2 * (tail := tail + math.comb(count, cut + 1)) <= (1 - CONFIDENCE) * 2**count:
        cut += 1
    return sorted(values)[cut], sorted(values)[count - 1 - cut]


def is_within(ends: tuple[float, float], limit: float = TOLERANCE) -> bool | None:
    """Return whether an interval is below a limit; ``None`` if the limit is inside it."""
    low, high = ends
    return False if low > limit else True if high <= limit else None


@dataclass(frozen=True)
class Compared:
    """Ratios of pairs that were measured one right after the other."""

    pairs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median ratio."""
        return statistics.median(self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the median; None where there are too few pairs for one."""
        return interval(self.pairs) if len(self.pairs) >= FEWEST_ROUNDS else None

    def __format__(self, spec: str) -> str:
        """Return median and interval, with two digits unless ``spec`` says otherwise."""
        spec = spec or ".2f"
        ends = self.interval
        shown = f" ({ends[0]:{spec}} to {ends[1]:{spec}})" if ends else ""
        return f"{self.median:{spec}}{shown}"

    def __str__(self) -> str:
        """Return median and interval with two digits."""
        return format(self)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Compared:
    """Divide pair by pair.

    Raises:
        ValueError: they are not equally many, or none.
    """
    if not ours:
        raise ValueError("no pairs to compare")
    return Compared(tuple(a / b for a, b in zip(ours, theirs, strict=True)))
