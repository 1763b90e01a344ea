# SPDX-License-Identifier: Apache-2.0
"""Fills the GPU passages of README, docs and benchmarks from the results file.

A passage stands between ``<!-- python -m benchmarks.gpu.pages: NAME -->`` and ``<!-- python -m
benchmarks.gpu.pages: end -->``. A run of the report fills them; so does ``python -m
benchmarks.gpu.pages``. A test fails when a page says anything else than the results.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.efficiency.paper import BUDGETS as NEXT_BUDGETS
from benchmarks.efficiency.paper import FULL_TOKENS, ROWS, UNPRUNED
from benchmarks.gpu import figures
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.marks import marks
from benchmarks.gpu.report import report, summary
from benchmarks.gpu.results import RESULTS, Results, read
from benchmarks.measuring.report import Mark, table

COMMAND: Final = "python -m benchmarks.gpu.pages"
NOT_RUN: Final = "Nothing has run on a GPU yet; `make gpu-report` fills this in."


def ran_on(results: Results) -> str:
    """Name the GPUs that figures came from."""
    used = {figure.run for figure in results.figures.values()}
    names = dict.fromkeys(str(results.runs[number - 1]["gpu"]) for number in sorted(used))
    return " and ".join(names)


def overview(results: Results, prefix: str) -> str:
    """Say in a sentence what has run on a GPU.

    Args:
        results: of all runs.
        prefix: path from the page to the repository's root.

    """
    link = f"[GPU report]({prefix}benchmarks/gpu/report.md)"
    if not results.figures:
        return f"**Nothing has run on a GPU yet**: the {link} is open, `make gpu-report` fills it."
    return f"On {ran_on(results)}: {summary(marks(results))} The {link} has every figure."


def marks_of(results: Results, *words: str) -> str:
    """Return the table of the marks that have one of these words in their name."""
    chosen = [mark for mark in marks(results) if any(word in mark.asked for word in words)]
    return table(("asked on a GPU", "found", ""), [_row(mark) for mark in chosen])


def _row(mark: Mark) -> tuple[str, str, str]:
    return mark.asked, mark.found, {True: "met", False: "**missed**", None: "open"}[mark.met]


def next_table(results: Results) -> str:
    """Return LLaVA-NeXT-7B's latency and memory beside the paper's table."""
    rows = []
    for tokens in (FULL_TOKENS, *NEXT_BUDGETS):
        paper = ROWS[UNPRUNED if tokens == FULL_TOKENS else "flashvlm", tokens]
        names = [figures.next_time(tokens, what) for what in (figures.SCHEDULED, figures.WHOLE)]
        found = [_shown(results, name) for name in (*names, figures.next_memory(tokens))]
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
            *(_shown(results, figures.throughput(column, clients)) for clients in figures.CLIENTS),
            *(
                _shown(results, figures.times_stock(column, clients))
                for clients in figures.CLIENTS
                if column != figures.STOCK
            ),
            *(["1"] * len(figures.CLIENTS) if column == figures.STOCK else []),
        )
        for column in figures.COLUMNS
    ]
    head = (
        "budget",
        *(f"requests/s, {clients} clients" for clients in figures.CLIENTS),
        *(f"times stock, {clients}" for clients in figures.CLIENTS),
    )
    return table(head, rows)


def _shown(results: Results, name: str) -> str:
    found = results.figures.get(name)
    return "open" if found is None else f"{found.value} {found.unit}".strip()


def second_question(results: Results) -> str:
    """Return the marks of a second question about an image."""
    return marks_of(results, "second question")


PASSAGES: Final[dict[tuple[str, str], Callable[[Results], str]]] = {
    ("README.md", "overview"): lambda results: overview(results, ""),
    ("docs/contributors/benchmarks.md", "overview"): lambda results: overview(results, "../../"),
    ("docs/operators/limitations.md", "overview"): lambda results: (
        "* " + overview(results, "../../")
    ),
    ("benchmarks/README.md", "overview"): lambda results: overview(results, "../"),
    ("benchmarks/selection/README.md", "marks"): lambda results: marks_of(
        results, "selection", figures.GPU_TESTS
    ),
    ("benchmarks/serving/README.md", "throughput"): throughput_table,
    ("benchmarks/efficiency/README.md", "latency"): next_table,
    ("benchmarks/multiturn/README.md", "second"): second_question,
}
"""Page and name of each passage."""


def filled(page: str, name: str, text: str) -> str:
    """Return the page's content with one passage exchanged.

    Raises:
        ValueError: the page has no such passage.

    """
    content = (ROOT / page).read_text()
    begin, end = f"<!-- {COMMAND}: {name} -->", f"<!-- {COMMAND}: end -->"
    pattern = re.compile(f"({re.escape(begin)}\n\n).*?(\n\n{re.escape(end)})", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{page} has no passage {begin}")
    return pattern.sub(lambda found: found[1] + text + found[2], content, count=1)


def fill(path: Path = RESULTS) -> None:
    """Write all passages, and the committed report."""
    results = read(path)
    for (page, name), write in PASSAGES.items():
        (ROOT / page).write_text(filled(page, name, write(results)))
    (RESULTS.parent / "report.md").write_text(report(results))


if __name__ == "__main__":
    fill()
