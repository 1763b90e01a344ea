# SPDX-License-Identifier: Apache-2.0
"""What a budget costs and saves, drawn from the committed results; nothing is measured.

``python -m benchmarks.overview.run`` writes ``docs/users/budgets.svg``, the tables of
``docs/users/choosing-a-budget.md``, the summary in ``benchmarks/accuracy/README.md`` and the models
in ``benchmarks/language_attention/README.md``.
"""

import argparse
import sys

from benchmarks.measuring.folders import committed
from benchmarks.overview.figures import (
    answers,
    kinds_table,
    speed_table,
    speeds,
    summary_table,
    trainings_table,
)
from benchmarks.overview.plot import PICTURE, draw
from scripts.pages import with_part

PAGE = PICTURE.with_name("choosing-a-budget.md")
ACCURACY = committed("accuracy") / "README.md"
LANGUAGE_ATTENTION = committed("language_attention") / "README.md"
SETS = {"models, plain": "plain", "models, small object": "stress"}
"""Marks in that page, and the questions."""


def main() -> int:
    """Draw the plot and write the tables."""
    summary, _, _ = (__doc__ or "").partition("\n")
    argparse.ArgumentParser(description=summary).parse_args()
    plain, served = answers(), speeds()
    draw(plain, served, PICTURE)
    page = with_part(PAGE.read_text(), "kinds", kinds_table(plain))
    PAGE.write_text(with_part(page, "speed", speed_table(served)))
    ACCURACY.write_text(with_part(ACCURACY.read_text(), "summary", summary_table(plain)))
    page = LANGUAGE_ATTENTION.read_text()
    for mark, name in SETS.items():
        page = with_part(page, mark, trainings_table(name))
    LANGUAGE_ATTENTION.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
