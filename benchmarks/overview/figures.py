# SPDX-License-Identifier: Apache-2.0
"""Accuracy and throughput by budget, as tables, from the committed results."""

from __future__ import annotations

import json
from typing import Any, Final

from benchmarks.accuracy.figures import Set
from benchmarks.accuracy.rows import closed
from benchmarks.accuracy.statistics import Interval, mean_ratio, relative, share
from benchmarks.measuring.folders import committed
from benchmarks.measuring.pairs import Compared, compare
from benchmarks.measuring.report import table
from flashvlm_vllm.selection.registry import BUILT_IN

KINDS: Final = ("color", "shape", "letter", "exist", "where")
SELECTORS: Final = ("llm-attention", "flashvlm-2", "flashvlm", "vispruner")
"""Three that use the question, and the best that does not."""
ROWS: Final = (*SELECTORS, "random", "downscale")
"""With lower bounds."""
LABELS: Final = {
    "downscale": "image scaled down",
    "tome": "ToMe",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "fastv-boundary": "FastV's score before the model (`fastv-boundary`)",
    "sparsevlm-boundary": "SparseVLM's score before the model (`sparsevlm-boundary`)",
    "oracle": "oracle",
    **{closed(name): f"`{name}`, positions closed" for name in BUILT_IN},
}
SUMMARY: Final = (
    *("flashvlm", closed("flashvlm"), "flashvlm-2", closed("flashvlm-2"), "llm-attention"),
    *("vispruner", closed("vispruner"), "divprune", "cdpruner", "visionzip", "prumerge+", "tome"),
    *("fastv-boundary", "sparsevlm-boundary", "fastv", "sparsevlm", "downscale", "oracle"),
)
TRAININGS: Final = {"first model": "", "`seed-2`": "seed-2", "`deep`": "deep"}
"""Folders in ``benchmarks/accuracy`` of models with other weights."""
LEVELS: Final = {
    "random, 1 client": "1 client",
    "random, 8 clients": "8 clients",
    "random, 32 clients": "32 clients",
}


def answers(name: str = "plain", training: str = "") -> Set:
    """Return a set of images with one question each, asked of a model."""
    found = json.loads((committed("accuracy") / training / "results.json").read_text())
    return Set(found, name)


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


def percent_of(plain: Set, row: str, budget: int, kinds: tuple[str, ...]) -> float:
    """Return the same in percent, without an interval, which takes seconds."""
    of_row, of_whole = (
        [plain.family(marks, kind) for kind in kinds]
        for marks in (plain.rows[f"{row}@{budget}"], plain.unpruned)
    )
    return 100 * mean_ratio(of_row, of_whole)


def summary_table(plain: Set) -> str:
    """Return accuracy in percent of the unpruned model's, with and without questions of place."""
    count = f"plain set, {len(plain.families)} questions"
    first, *others = map(str, plain.budgets)
    head = [count, f"{first} tokens", *others, f"all but *where*: {first}", *others]
    rows = [
        [
            LABELS.get(row, f"`{row}`"),
            *(
                f"{percent_of(plain, row, budget, kinds):.1f}"
                for kinds in (KINDS, KINDS[:-1])
                for budget in plain.budgets
            ),
        ]
        for row in SUMMARY
    ]
    return table(head, rows)


def trainings_table(name: str) -> str:
    """Return correct answers in percent of the unpruned model's, by model, of one set."""
    trainings = {title: answers(name, folder) for title, folder in TRAININGS.items()}
    first, *_ = trainings.values()
    head = [f"at {' / '.join(map(str, first.budgets))} tokens", *trainings]
    whole = [f"{share(one.unpruned).value:.3f}" for one in trainings.values()]
    rows = [["unpruned, share of right answers", *whole]]
    for row in SELECTORS:
        shares = [
            [
                f"{100 * sum(one.rows[f'{row}@{budget}']) / sum(one.unpruned):.1f}"
                for budget in one.budgets
            ]
            for one in trainings.values()
        ]
        rows.append([f"`{row}`", *map(" / ".join, shares)])
    return table(head, rows)


def kinds_table(plain: Set) -> str:
    """Return accuracy in percent of the unpruned model's, by kind of question and budget."""
    head = ["", *(f"{kind}: {'/'.join(map(str, plain.budgets))}" for kind in KINDS)]
    rows = [
        [
            LABELS.get(row, f"`{row}`"),
            *(
                " / ".join(
                    f"{percent_of(plain, row, budget, (kind,)):.0f}" for budget in plain.budgets
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
