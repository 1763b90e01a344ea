# SPDX-License-Identifier: Apache-2.0
"""Throughput by clients, and LLaVA-NeXT's latency next to the paper's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.efficiency.paper import BUDGETS, FULL_TOKENS, ROWS, UNPRUNED
from benchmarks.gpu import keys
from benchmarks.gpu.results import Results
from benchmarks.measuring.drawing import blank
from benchmarks.serving.plan import COLUMNS, STOCK


def plot(results: Results, file: Path) -> None:
    """Draw the measured figures; places of others stay empty."""
    figure = blank(10, 4)
    left, right = figure.subplots(1, 2)
    clients = [n for n in keys.CLIENTS if _at(results, STOCK, n) is not None]
    for column in COLUMNS:
        speeds = [_at(results, column, n) or 0.0 for n in clients]
        if clients:
            left.plot([str(n) for n in clients], speeds, marker="o", label=column)
    left.set_xlabel("clients")
    left.set_title("LLaVA-1.5-7B's shape: requests/s")
    if clients:
        left.legend(frameon=False)
    lengths = (FULL_TOKENS, *BUDGETS)
    ours = [results.number(keys.next_time(tokens, keys.SCHEDULED)) or 0.0 for tokens in lengths]
    paper = [
        ROWS[UNPRUNED if tokens == FULL_TOKENS else "flashvlm", tokens].latency_ms
        for tokens in lengths
    ]
    places = range(len(lengths))
    right.bar([place - 0.2 for place in places], ours, 0.4, label="measured")
    right.bar([place + 0.2 for place in places], paper, 0.4, label="paper, A100")
    right.set_xticks(places, [str(tokens) for tokens in lengths])
    right.set_xlabel("visual tokens")
    right.set_title("LLaVA-NeXT-7B's shape: first token, ms")
    right.legend(frameon=False)
    if any(run["rehearsal"] for run in results.runs):
        figure.suptitle("rehearsal: tiny models on a CPU")
    figure.savefig(file, dpi=110)


def _at(results: Results, column: str, clients: int) -> float | None:
    return results.number(keys.throughput(column, clients))
