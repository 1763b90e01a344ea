# SPDX-License-Identifier: Apache-2.0
"""Compares answers under load with those without load."""

import math
from typing import Any, Final, Literal

from benchmarks.soak.clients import Answer

Verdict = Literal["right", "near tie", "wrong"]

NEAR_TIE: Final = 1e-3
"""A difference in log probability that rounding may reverse: kernels add in another order when
other requests share a batch. In float32 that changes a logit by about 1e-5."""

SCORE: Final = 1e-3
"""The same for scores, which are between 0 and 1. The kept patches must be equal."""


def judge(quiet: Answer, loud: Answer) -> Verdict:
    """Compare an answer with the one without load.

    A near tie is a different word where the two best words without load were nearly equal, with the
    same words before it and the same counts of prompt and visual tokens.
    """
    if (quiet.status, quiet.text) == (loud.status, loud.text):
        if alike(quiet.counts, loud.counts):
            return "right"
        return "wrong"
    if quiet.status != loud.status or quiet.status != 200 or not quiet.margins:
        return "wrong"
    if _without_words(quiet.counts) != _without_words(loud.counts):
        return "wrong"
    same = 0
    for token, lead in quiet.margins:
        if loud.text[same : same + len(token)] != token:
            return "near tie" if lead < NEAR_TIE else "wrong"
        same += len(token)
    return "wrong"


def judge_beginning(quiet: Answer, begun: Answer) -> Verdict:
    """Compare what a client read before it disconnected."""
    if begun.status == quiet.status and quiet.text.startswith(begun.text):
        return "right"
    same = 0
    for token, lead in quiet.margins:
        if not begun.text[same:].startswith(token):
            return "near tie" if lead < NEAR_TIE else "wrong"
        same += len(token)
    return "wrong"


def alike(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal except for the rounding of scores."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=SCORE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _without_words(counts: object) -> object:
    # After a different word the number of words may differ, too.
    return (counts[0], counts[2]) if isinstance(counts, tuple) else counts
