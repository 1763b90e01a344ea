# SPDX-License-Identifier: Apache-2.0
"""Answers of the small VLM after a choice in blocks and after the same choice over all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.accuracy import rows
from benchmarks.accuracy.reference import Reference
from benchmarks.accuracy.sets import plain
from benchmarks.accuracy.statistics import Interval, paired
from benchmarks.selection.in_blocks import pairs_up_to
from flashvlm_vllm.selection import long_lists
from small_vlm import WEIGHTS
from small_vlm.architecture import VISUAL_TOKENS

QUESTIONS: Final = 600
"""Those of `benchmarks.accuracy`, with its seed."""
SEED: Final = 1
SELECTORS: Final = ("flashvlm-2", "cdpruner", "divprune")
"""Those that compare all pairs of a list, if it is not too long."""
BUDGETS: Final = (64, 32)
PARTS: Final = 4
"""All pairs are compared of a list as long as one of so many parts of the image: the image has as
many times too many tokens for that as 16,384 tokens have for `MOST_PAIRED`."""
NORMAL_95: Final = 1.959964


@dataclass(frozen=True)
class Answers:
    """Right answers to the same questions; the difference is in blocks minus all pairs."""

    selector: str
    budget: int
    questions: int
    right_all_pairs: int
    right_in_blocks: int
    only_in_blocks: int
    only_all_pairs: int
    difference: Interval
    """Of the accuracies, with its 95 % interval."""
    p: float
    """McNemar's exact test, two-sided."""


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Accuracy of the first minus that of the second on the same questions, 95 % interval.

    Agresti and Min's: Wald's after half a question more of each of the four kinds of pairs, which
    keeps its coverage where few answers differ.
    """
    found = paired(first, second)
    count = len(first) + 2
    discordant = found.only_first + found.only_second + 1
    middle = (found.only_first - found.only_second) / count
    half = NORMAL_95 * math.sqrt(discordant / count - middle**2) / math.sqrt(count)
    return Interval(found.difference, middle - half, middle + half)


def measure_answers() -> list[Answers]:
    """Every selector that compares all pairs, at every budget. On the CPU, without a server."""
    reference = Reference(WEIGHTS)
    prepared = rows.prepare(reference, plain(QUESTIONS, SEED))
    return [_measure(reference, prepared, name, each) for name in SELECTORS for each in BUDGETS]


def _measure(reference: Reference, prepared: rows.Prepared, name: str, budget: int) -> Answers:
    exact = _right(reference, prepared, name, budget)
    most = VISUAL_TOKENS // PARTS
    with pairs_up_to(most, most * long_lists.BLOCK // long_lists.MOST_PAIRED):
        blocks = _right(reference, prepared, name, budget)
    found = paired(blocks, exact)
    return Answers(
        selector=name,
        budget=budget,
        questions=len(exact),
        right_all_pairs=sum(exact),
        right_in_blocks=sum(blocks),
        only_in_blocks=found.only_first,
        only_all_pairs=found.only_second,
        difference=paired_difference(blocks, exact),
        p=found.p,
    )


def _right(reference: Reference, prepared: rows.Prepared, name: str, budget: int) -> list[bool]:
    with torch.inference_mode():
        said = rows.answers(reference, prepared, rows.by_selector(name), budget)
    return [each == item.question.answer for each, item in zip(said, prepared.items, strict=True)]
