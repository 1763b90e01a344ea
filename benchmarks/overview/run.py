# SPDX-License-Identifier: Apache-2.0
"""What a budget costs and saves, drawn from the committed results; nothing is measured.

``python -m benchmarks.overview.run`` writes ``docs/users/budgets.svg`` and the tables of
``docs/users/choosing-a-budget.md``.
"""

import argparse
import sys

from benchmarks.overview.figures import answers, kinds_table, speed_table, speeds
from benchmarks.overview.plot import PICTURE, draw
from scripts.pages import with_part

PAGE = PICTURE.with_name("choosing-a-budget.md")


def main() -> int:
    """Draw the plot and write the tables."""
    summary, _, _ = (__doc__ or "").partition("\n")
    argparse.ArgumentParser(description=summary).parse_args()
    plain, served = answers(), speeds()
    draw(plain, served, PICTURE)
    page = with_part(PAGE.read_text(), "kinds", kinds_table(plain))
    PAGE.write_text(with_part(page, "speed", speed_table(served)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
