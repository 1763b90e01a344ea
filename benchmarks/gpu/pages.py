# SPDX-License-Identifier: Apache-2.0
"""Fills the GPU passages of README, docs and benchmarks from the results file.

A passage is named ``GPU NAME`` in its page (`scripts.pages`). A run of the report fills them; so
does ``python -m benchmarks.gpu.pages``. A test fails when a page differs from the results.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.efficiency.paper import BUDGETS as NEXT_BUDGETS
from benchmarks.efficiency.paper import FULL_TOKENS, ROWS, UNPRUNED
from benchmarks.gpu import keys
from benchmarks.gpu.figures import NOT_RUN, marks
from benchmarks.gpu.report import report, summary, targets_table
from benchmarks.gpu.results import RESULTS, Results, read
from benchmarks.measuring.folders import ROOT
from benchmarks.measuring.report import table
from benchmarks.serving.plan import COLUMNS, STOCK
from scripts.pages import with_part


def ran_on(results: Results) -> str:
    """Return the names of the measured GPUs."""
    used = {figure.run for figure in results.figures.values()}
    names = dict.fromkeys(str(results.runs[number - 1]["gpu"]) for number in sorted(used))
    return " and ".join(names)


def overview(results: Results, prefix: str) -> str:
    """Return a sentence about the runs on a GPU.

    Args:
        results: of all runs.
        prefix: path from the page to the repository's root.

    """
    link = f"[GPU report]({prefix}benchmarks/gpu/report.md)"
    if not results.figures:
        return (
            "**No benchmark has run on a GPU yet.** `make gpu-report` runs them and writes the "
            f"{link}."
        )
    return f"On {ran_on(results)}: {summary(marks(results))} The {link} has all figures."


def marks_of(results: Results, *words: str) -> str:
    """Return a table of the targets with one of these words in their name."""
    chosen = [mark for mark in marks(results) if any(word in mark.asked for word in words)]
    return targets_table("target on a GPU", chosen)


def next_table(results: Results) -> str:
    """Return LLaVA-NeXT-7B's latency and memory next to the paper's."""
    rows = []
    for tokens in (FULL_TOKENS, *NEXT_BUDGETS):
        paper = ROWS[UNPRUNED if tokens == FULL_TOKENS else "flashvlm", tokens]
        names = [keys.next_time(tokens, what) for what in (keys.SCHEDULED, keys.WHOLE)]
        found = [_shown(results, name) for name in (*names, keys.next_memory(tokens))]
        rows.append((tokens, found[0], found[1], paper.latency_ms, found[2], paper.memory_gb))
    head = (
        "tokens", "scheduled to first token", "whole request", "paper, A100 (ms)", "GPU memory",
        "paper (GB)",
    )  # fmt: skip
    return table(head, rows)


def throughput_table(results: Results) -> str:
    """Return requests/s of every column."""
    rows = [
        (
            column,
            *(_shown(results, keys.throughput(column, clients)) for clients in keys.CLIENTS),
            *(
                _shown(results, keys.times_stock(column, clients))
                for clients in keys.CLIENTS
                if column != STOCK
            ),
            *(["1"] * len(keys.CLIENTS) if column == STOCK else []),
        )
        for column in COLUMNS
    ]
    head = (
        "budget",
        *(f"requests/s, {keys.clients_text(clients)}" for clients in keys.CLIENTS),
        *(f"relative to stock, {keys.clients_text(clients)}" for clients in keys.CLIENTS),
    )
    return table(head, rows)


def _shown(results: Results, name: str) -> str:
    found = results.figures.get(name)
    return NOT_RUN if found is None else f"{found.value} {found.unit}".strip()


def second_question(results: Results) -> str:
    """Return the targets of a second question about an image."""
    return marks_of(results, "second question")


PASSAGES: Final[dict[tuple[str, str], Callable[[Results], str]]] = {
    ("README.md", "overview"): lambda results: overview(results, ""),
    ("docs/contributors/benchmarks.md", "overview"): lambda results: overview(results, "../../"),
    ("docs/operators/limitations.md", "overview"): lambda results: (
        "* " + overview(results, "../../")
    ),
    ("benchmarks/README.md", "overview"): lambda results: overview(results, "../"),
    ("benchmarks/selection/README.md", "marks"): lambda results: marks_of(
        results, "selection", keys.GPU_TESTS
    ),
    ("benchmarks/serving/README.md", "throughput"): throughput_table,
    ("benchmarks/efficiency/README.md", "latency"): next_table,
    ("benchmarks/multiturn/README.md", "second"): second_question,
}
"""Page and name of each passage."""


def filled(page: str, name: str, text: str) -> str:
    """Return the page's content with one passage replaced.

    Raises:
        ValueError: the page has no such passage.

    """
    return with_part((ROOT / page).read_text(), f"GPU {name}", text)


def fill(path: Path = RESULTS) -> None:
    """Write all passages, and the committed report."""
    results = read(path)
    for (page, name), write in PASSAGES.items():
        (ROOT / page).write_text(filled(page, name, write(results)))
    (RESULTS.parent / "report.md").write_text(report(results))


if __name__ == "__main__":
    fill()
