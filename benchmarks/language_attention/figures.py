# SPDX-License-Identifier: Apache-2.0
"""The table of all variants, from the results of each model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

from benchmarks.accuracy.statistics import paired
from benchmarks.measuring.report import table

FIRST: Final = ("unpruned", "oracle", "vispruner", "flashvlm", "flashvlm-2")
SETS: Final = ("plain", "stress", "described")
CHOSEN: Final = "choice by both layers: determinant, weight score^1"
"""The row that is `llm-attention` as it is served."""
NOTE: Final = """\
Correct answers, in shares of 1, at 128, 64 and 32 of 576 tokens, with positions kept. *p*:
McNemar's exact test against `llm-attention` over the three budgets of both question sets together,
as far as they are measured; + where the variant has more correct answers, - where it has fewer.
*Objects described*: share of a scene's objects that "describe the picture" names with place, colour
and kind.

Ways to score tokens are compared with the tokens of the highest scores kept. *choice* compares ways
to choose tokens by the score of the second layer, *choice by both layers* by the score of
`llm-attention`. Until version 0.2 `llm-attention` read the second layer only; it was *the highest
where a head reads over 35% from one token, else score^2*."""


def write_report(folder: Path) -> None:
    """Write ``report.md`` from the results files in a folder."""
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# Every variant that was tried",
        NOTE,
    ]
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name != "results.json"):
        found = json.loads(path.read_text())
        if "right" in found:
            parts += [heading(path, found["about"]), variant_table(found)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def heading(path: Path, about: Mapping[str, Any]) -> str:
    """Return the heading of a model."""
    name = "The committed model" if path.name == "results.json" else path.stem
    return (
        f"## {name}: {about['layers']} decoder layers of width {about['width']}, "
        f"{about['questions']} development questions of each set"
    )


def variant_table(found: Mapping[str, Any]) -> str:
    """Return the table of one model, the served selector in its place among the layers."""
    right = found["right"]
    budgets = [str(each) for each in found["about"]["budgets"]]
    rows = []
    for name in sorted(right[SETS[0]], key=lambda each: (each not in FIRST, _order(each))):
        known = [own for own in SETS if name in right.get(own, {})]
        cells = [" / ".join(_shares(right[own][name])) if own in known else "" for own in SETS]
        test = ""
        both = [own for own in known if own in SETS[:2] and CHOSEN in right[own]]
        if name not in FIRST and name != CHOSEN and both:
            ours, theirs = (
                [_marks(right, own, row, budget) for own in both for budget in budgets]
                for row in (name, CHOSEN)
            )
            found_test = paired(list(chain(*ours)), list(chain(*theirs)))
            sign = "+" if found_test.difference > 0 else "-" if found_test.difference else ""
            test = f"{sign} {found_test.p:.2g}".strip()
        shown = f"**{name} (`llm-attention`)**" if name == CHOSEN else name
        rows.append((shown, *cells[:2], test, cells[2]))
    return table(("", "plain", "small object asked for", "p", "objects described"), rows)


def _order(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _shares(marks: Mapping[str, str]) -> list[str]:
    return [f"{each.count('1') / len(each):.3f}" for each in marks.values()]


def _marks(right: Mapping[str, Any], own: str, name: str, budget: str) -> list[bool]:
    return [mark == "1" for mark in right[own][name][budget]]
