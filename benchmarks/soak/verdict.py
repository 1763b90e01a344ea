# SPDX-License-Identifier: Apache-2.0
"""Whether an answer under load is the one that the quiet server gave."""

import math
from typing import Any, Final, Literal

from benchmarks.soak.clients import Answer

Verdict = Literal["right", "near tie", "wrong"]

NEAR_TIE: Final = 1e-3
"""A lead in log probability that rounding may turn: kernels add up in another order when other
requests share a batch. In float32 that moves a logit by 1e-5 or so."""

SCORE: Final = 1e-3
"""The same for scores, which lie between 0 and 1. Which patches are kept has to be equal."""


def judge(quiet: Answer, loud: Answer) -> Verdict:
    """Compare an answer with the quiet server's.

    A near tie is another word at a place where the quiet server's two best were as good as equal,
    with all words before it and every count of prompt and visual tokens the same.
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
    """Compare what a client read before it left."""
    if begun.status == quiet.status and quiet.text.startswith(begun.text):
        return "right"
    same = 0
    for token, lead in quiet.margins:
        if not begun.text[same:].startswith(token):
            return "near tie" if lead < NEAR_TIE else "wrong"
        same += len(token)
    return "wrong"


def alike(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are the same but for rounding of the scores in them."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=SCORE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _without_words(counts: object) -> object:
    # An answer that took another turn may also end elsewhere.
    return (counts[0], counts[2]) if isinstance(counts, tuple) else counts
