# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests for right/wrong answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def share(right: Sequence[bool]) -> Interval:
    """Return the share of right answers with Wilson's interval."""
    count = len(right)
    value = sum(right) / count
    z = 1.959964
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    )
    return Interval(value, middle - half, middle + half)


def mean_ratio(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Return the paper's "ACC": the unweighted mean of score / reference."""
    return float(np.mean(np.asarray(scores) / np.asarray(reference)))


def relative(
    right: Sequence[bool], reference: Sequence[bool], groups: Sequence[str], seed: int = 0
) -> Interval:
    """Return the "ACC" of a row, with the groups in the place of the paper's benchmarks.

    Args:
        right: answers with a selector.
        reference: answers of the unpruned model to the same questions.
        groups: the question family of each; each counts alike.
        seed: of the bootstrap over questions, which is paired and within families.

    """
    names = sorted(set(groups))
    members = [np.flatnonzero([group == name for group in groups]) for name in names]
    ours, theirs = np.asarray(right, float), np.asarray(reference, float)

    def ratio(chosen: list[np.ndarray]) -> float:
        return mean_ratio(*([part[rows].mean() for rows in chosen] for part in (ours, theirs)))

    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [ratio([rng.choice(rows, len(rows)) for rows in members]) for _ in range(RESAMPLES)]
        value = ratio(members)
    # A resample without any right answer of the reference has no ratio.
    low, high = np.quantile([each for each in drawn if np.isfinite(each)], [0.025, 0.975])
    return Interval(value, float(low), float(high))


class Paired(NamedTuple):
    """McNemar's exact test on the questions that only one of two methods got right."""

    difference: float
    """Accuracy of the first minus that of the second."""
    only_first: int
    only_second: int
    p: float
    """Two-sided."""


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two methods on the same questions."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    count, smaller = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(smaller + 1))
    p = min(1.0, 2 * tail / 2**count)
    return Paired((only_first - only_second) / len(first), only_first, only_second, p)
