# SPDX-License-Identifier: Apache-2.0
"""Accuracy and throughput by budget, as tables, from the committed results."""

from __future__ import annotations

import json
from typing import Any, Final

from benchmarks.accuracy.figures import Set
from benchmarks.accuracy.statistics import Interval, relative
from benchmarks.measuring.folders import committed
from benchmarks.measuring.pairs import Compared, compare
from benchmarks.measuring.report import table

KINDS: Final = ("color", "shape", "letter", "exist", "where")
# Three selectors that use the question, the best that does not, and lower bounds.
ROWS: Final = ("llm-attention", "flashvlm-2", "flashvlm", "vispruner", "random", "downscale")
LABELS: Final = {"downscale": "image scaled down"}
LEVELS: Final = {
    "random, 1 client": "1 client",
    "random, 8 clients": "8 clients",
    "random, 32 clients": "32 clients",
}


def answers() -> Set:
    """Return the plain set: 600 images with one question each."""
    found = json.loads((committed("accuracy") / "results.json").read_text())
    return Set(found, "plain")


def speeds() -> dict[str, Any]:
    """Return the results of the serving benchmark."""
    found: dict[str, Any] = json.loads((committed("serving") / "results.json").read_text())
    return found


def kept_of(plain: Set, row: str, budget: int, kinds: tuple[str, ...]) -> Interval:
    """Return a row's accuracy over kinds of questions, relative to the unpruned model."""
    chosen = [at for at, kind in enumerate(plain.families) if kind in kinds]
    right = plain.rows[f"{row}@{budget}"]
    return relative(
        [right[at] for at in chosen],
        [plain.unpruned[at] for at in chosen],
        [plain.families[at] for at in chosen],
    )


def kinds_table(plain: Set) -> str:
    """Return accuracy in percent of the unpruned model's, by kind of question and budget."""
    head = ["", *(f"{kind}: {'/'.join(map(str, plain.budgets))}" for kind in KINDS)]
    rows = [
        [
            LABELS.get(row, f"`{row}`"),
            *(
                " / ".join(
                    f"{100 * kept_of(plain, row, budget, (kind,)).value:.0f}"
                    for budget in plain.budgets
                )
                for kind in KINDS
            ),
        ]
        for row in ROWS
    ]
    return table(head, rows)


def speed_of(served: dict[str, Any], level: str, budget: int) -> Compared:
    """Return requests/s relative to stock vLLM, round by round."""
    turns = served["levels"][level]["turns"]
    # All turns of a level have as many requests.
    stock, ours = ([turn["seconds"] for turn in turns[name]] for name in ("stock", str(budget)))
    return compare(stock, ours)


def speed_table(served: dict[str, Any]) -> str:
    """Return requests/s relative to stock vLLM, with intervals."""
    head = ["requests/s, relative to stock vLLM (95 %)", *LEVELS.values()]
    rows = [
        [f"{budget} tokens", *(f"{speed_of(served, level, budget)}" for level in LEVELS)]
        for budget in (128, 64, 32)
    ]
    return table(head, rows)
