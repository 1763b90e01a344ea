# SPDX-License-Identifier: Apache-2.0
"""The answers that a loaded server may give, from those of a server without load.

A request without a budget gets one while requests wait (``--visual-budget-under-load``), and the
response says so. Its answer must then be that of the same request with that budget.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from benchmarks.soak.bodies import TOKENIZE
from benchmarks.soak.calls import Call
from benchmarks.soak.clients import Answer
from benchmarks.soak.verdict import Verdict, judge, judge_beginning

UNDER_LOAD: Final = 64
"""Tokens of each image while requests wait."""
WAITING: Final = 1
"""The number of waiting requests above which that applies."""


class Expected:
    """The correct answers to a set of requests."""

    def __init__(self, quiet: Mapping[Call, Answer], reduced: Mapping[Call, Answer]) -> None:
        """Take the answers to the requests, and those to requests of `reduced_calls`."""
        self.calls = list(quiet)
        self._quiet = dict(quiet)
        self._reduced = dict(reduced)
        self.under_load = 0
        """Answers with the budget under load so far."""

    def judge(self, call: Call, loud: Answer) -> tuple[Verdict, Answer]:
        """Judge a whole answer.

        Returns:
            The verdict, and the answer without load that it was compared with.
        """
        quiet, reduced = self._quiet[call], self._reduced_of(call)
        if reduced is None:
            return judge(quiet, loud), quiet
        counts, is_reduced = without_load(loud.counts)
        if call.path == TOKENIZE:
            # Its answer is a number of tokens only.
            is_reduced = loud.counts == reduced.counts
        if not is_reduced:
            return judge(quiet, loud), quiet
        self.under_load += 1
        stripped = Answer(loud.status, loud.text, counts, loud.margins)
        return judge(reduced, stripped), reduced

    def judge_beginning(self, call: Call, begun: Answer) -> tuple[Verdict, Answer]:
        """Judge what a client read before it disconnected, which does not say if it was reduced."""
        quiet = self._quiet[call]
        verdict = judge_beginning(quiet, begun)
        reduced = self._reduced_of(call)
        if verdict != "wrong" or reduced is None:
            return verdict, quiet
        return judge_beginning(reduced, begun), reduced

    def _reduced_of(self, call: Call) -> Answer | None:
        return self._reduced.get(call.with_budget(UNDER_LOAD)) if call.takes_default else None


def reduced_calls(calls: Iterable[Call]) -> list[Call]:
    """Return the requests that others become under load."""
    return [call.with_budget(UNDER_LOAD) for call in calls if call.takes_default]


def without_load(counts: Any) -> tuple[Any, bool]:
    """Return counts without what they say about load, and whether they said anything."""
    if isinstance(counts, dict):
        inner = {name: without_load(value) for name, value in counts.items()}
        found = "under_load" in counts or any(said for _, said in inner.values())
        return {name: value for name, (value, _) in inner.items() if name != "under_load"}, found
    if isinstance(counts, list | tuple):
        each = [without_load(value) for value in counts]
        return type(counts)(value for value, _ in each), any(said for _, said in each)
    return counts, False
