# SPDX-License-Identifier: Apache-2.0
"""What a budget costs and buys, drawn from the committed results; nothing is measured here.

``python -m benchmarks.budgets`` writes ``docs/users/budgets.svg`` and prints the tables of
``docs/users/choosing-a-budget.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.report import Set
from benchmarks.accuracy.statistics import Interval, relative
from benchmarks.measuring.pairs import Compared, compare
from benchmarks.measuring.report import table

HERE: Final = Path(__file__).parent
PICTURE: Final = HERE.parent / "docs" / "users" / "budgets.svg"
KINDS: Final = ("color", "shape", "letter", "exist", "where")
# What is drawn: the two that read the question, the best that does not, the lower bounds.
ROWS: Final = ("flashvlm", "flashvlm-2", "vispruner", "random", "downscale")
LABELS: Final = {"downscale": "picture scaled down"}
LEVELS: Final = {
    "random, 1 client": "1 client",
    "random, 8 clients": "8 clients",
    "random, 32 clients": "32 clients",
}


def main() -> None:
    """Draw, and print."""
    summary, _, _ = (__doc__ or "").partition("\n")
    argparse.ArgumentParser(description=summary).parse_args()
    plain = answers()
    served = json.loads((HERE / "serving" / "results.json").read_text())
    draw(plain, served, PICTURE)
    print(f"{kinds_table(plain)}\n\n{speed_table(served)}")


def answers() -> Set:
    """Return the plain set: one question a picture, 600 of them."""
    found = json.loads((HERE / "accuracy" / "results.json").read_text())
    return Set(found, "plain")


def kept_of(plain: Set, row: str, budget: int, kinds: tuple[str, ...]) -> Interval:
    """Return a row's accuracy over kinds of questions as share of the unpruned model's."""
    chosen = [at for at, kind in enumerate(plain.families) if kind in kinds]
    right = plain.rows[f"{row}@{budget}"]
    return relative(
        [right[at] for at in chosen],
        [plain.unpruned[at] for at in chosen],
        [plain.families[at] for at in chosen],
    )


def kinds_table(plain: Set) -> str:
    """Return what is kept by kind of question, in percent, at every budget."""
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
    """Return requests/s over stock vLLM's, round by round."""
    turns = served["levels"][level]["turns"]
    # All turns of a level have as many requests.
    stock, ours = ([turn["seconds"] for turn in turns[name]] for name in ("stock", str(budget)))
    return compare(stock, ours)


def speed_table(served: dict[str, Any]) -> str:
    """Return requests/s, times stock vLLM's, with intervals."""
    head = ["requests/s, times stock's (95 %)", *LEVELS.values()]
    rows = [
        [f"{budget} tokens", *(f"{speed_of(served, level, budget)}" for level in LEVELS)]
        for budget in (128, 64, 32)
    ]
    return table(head, rows)


def draw(plain: Set, served: dict[str, Any], path: Path) -> None:
    """Write three panels: answers about things, answers about places, speed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "budgets"  # the same picture gives the same file
    from matplotlib import pyplot

    figure, (things, places, speed) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for panel, kinds in ((things, KINDS[:-1]), (places, KINDS[-1:])):
        for row in ROWS:
            shares = [kept_of(plain, row, budget, kinds) for budget in plain.budgets]
            middle = [100 * each.value for each in shares]
            below = [100 * (each.value - each.low) for each in shares]
            above = [100 * (each.high - each.value) for each in shares]
            strong = row.startswith("flashvlm")
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
    speed.set_title("requests/s, times stock vLLM's")
    speed.set_ylim(0, None)
    speed.legend(fontsize=8, frameon=False)
    for panel in (things, places, speed):
        panel.set_xscale("log", base=2)
        panel.set_xticks(plain.budgets, [str(budget) for budget in plain.budgets])
        panel.set_xlabel("visual tokens kept of 576")
        panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
