# SPDX-License-Identifier: Apache-2.0
"""Accuracy and throughput by budget, as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.figures import Set
from benchmarks.measuring.folders import ROOT
from benchmarks.overview.figures import KINDS, LABELS, LEVELS, ROWS, kept_of, speed_of

PICTURE: Final = ROOT / "docs" / "users" / "budgets.svg"


def draw(plain: Set, served: dict[str, Any], path: Path) -> None:
    """Write three panels: answers about objects, answers about places, and throughput."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "budgets"  # the same plot gives the same file
    from matplotlib import pyplot

    figure, (things, places, speed) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for panel, kinds in ((things, KINDS[:-1]), (places, KINDS[-1:])):
        for row in ROWS:
            shares = [kept_of(plain, row, budget, kinds) for budget in plain.budgets]
            middle = [100 * each.value for each in shares]
            below = [100 * (each.value - each.low) for each in shares]
            above = [100 * (each.high - each.value) for each in shares]
            strong = row.startswith(("flashvlm", "llm"))
            panel.errorbar(
                plain.budgets, middle, yerr=(below, above), label=LABELS.get(row, row),
                capsize=2, marker="o", markersize=4, linewidth=2 if strong else 1,
                linestyle="-" if strong or row == "vispruner" else "--",
            )  # fmt: skip
        panel.axhline(100, color="black", linewidth=0.8)
        panel.set_ylim(20, 109)
    things.set_title("right answers: what colour, shape, letter; is there")
    things.set_ylabel("share of the unpruned model's, %")
    places.set_title("right answers: where")
    things.legend(fontsize=8, frameon=False)
    for level, label in LEVELS.items():
        times = [speed_of(served, level, budget).median for budget in plain.budgets]
        speed.plot(plain.budgets, times, marker="o", markersize=4, label=label)
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set_title("requests/s, relative to stock vLLM")
    speed.set_ylim(0, None)
    speed.legend(fontsize=8, frameon=False)
    for panel in (things, places, speed):
        panel.set_xscale("log", base=2)
        panel.set_xticks(plain.budgets, [str(budget) for budget in plain.budgets])
        panel.set_xlabel("visual tokens kept of 576")
        panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
