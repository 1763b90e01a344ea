# SPDX-License-Identifier: Apache-2.0
"""Whether an answer under load is the one that the quiet server gave."""

from typing import Final, Literal

from benchmarks.soak.clients import Answer

Verdict = Literal["right", "near tie", "wrong"]

NEAR_TIE: Final = 1e-3
"""A lead in log probability that rounding may turn: kernels add up in another order when other
requests share a batch. In float32 that moves a logit by 1e-5 or so."""


def judge(quiet: Answer, loud: Answer) -> Verdict:
    """Compare an answer with the quiet server's.

    A near tie is another word at a place where the quiet server's two best were as good as equal,
    with all words before it and every count of prompt and visual tokens the same.
    """
    if (quiet.status, quiet.counts, quiet.text) == (loud.status, loud.counts, loud.text):
        return "right"
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


def _without_words(counts: object) -> object:
    # An answer that took another turn may also end elsewhere.
    return (counts[0], counts[2]) if isinstance(counts, tuple) else counts
