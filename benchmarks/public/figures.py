# SPDX-License-Identifier: Apache-2.0
"""A table's cells as Markdown and JSON."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.measuring.report import table as draw
from benchmarks.public.cells import Cell, Setting
from benchmarks.public.tables import Table

NOTHING = "-"


def markdown(table: Table, cells: Sequence[Cell]) -> str:
    """Return one row per setting and one column per task that lmms-eval has."""
    tasks = [task for task in table.tasks if task.name is not None]
    by_place = {(cell.setting, cell.task): cell for cell in cells}
    rows = list(dict.fromkeys(cell.setting for cell in cells))
    head = ["budget", "selector", *(task.dataset for task in tasks)]
    head += ["of unpruned", "visual tokens kept per image", "prompt tokens per request"]
    lines = []
    unpruned = [by_place.get((Setting(None, None), task)) for task in tasks]
    for row in rows:
        here = [by_place[row, task] for task in tasks if (row, task) in by_place]
        shown = [_shown(by_place.get((row, task))) for task in tasks]
        budget = "none" if row.budget is None else str(row.budget)
        start = [budget, row.selector or NOTHING]
        kept = _ratio(here, "visual_tokens_kept", "images")
        tokens = _ratio(here, "prompt_tokens", "requests")
        lines.append([*start, *shown, _relative(here, unpruned), kept, tokens])
    text = draw(head, lines)
    absent = [task.dataset for task in table.tasks if task.name is None]
    return f"{text}\n\nNot in lmms-eval: {', '.join(absent)}." if absent else text


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return everything about each cell."""
    return [
        {
            "dataset": cell.task.dataset,
            "task": cell.task.name,
            "budget": cell.setting.budget,
            "selector": cell.setting.selector,
            "score": cell.score,
            "metric": cell.task.metric,
            "metrics": cell.metrics,
            "samples": cell.samples,
            "costs": cell.costs,
            "seconds": cell.seconds,
            "error": cell.error,
            "command": cell.command,
        }
        for cell in cells
    ]


def _shown(cell: Cell | None) -> str:
    if cell is None or (cell.score is None and cell.error is None):
        return NOTHING
    if cell.score is None:
        return "failed"
    failed = cell.costs.get("failed", 0)
    return f"{cell.score:.1f}" + (f" ({failed} requests failed)" if failed else "")


def _relative(here: Sequence[Cell], unpruned: Sequence[Cell | None]) -> str:
    """Return the paper's average: the mean, over tasks, of the share of the unpruned score."""
    whole = {cell.task: cell.score for cell in unpruned if cell is not None and cell.score}
    shares = [cell.score / whole[cell.task] for cell in here if cell.score is not None
              and cell.task in whole]  # fmt: skip
    complete = shares and len(shares) == len(unpruned)
    return f"{100 * fmean(shares):.1f} %" if complete else NOTHING


def _ratio(here: Sequence[Cell], part: str, whole: str) -> str:
    counted = [cell.costs for cell in here if cell.costs.get(part) and cell.costs.get(whole)]
    if not counted:
        return NOTHING
    return f"{sum(costs[part] for costs in counted) / sum(costs[whole] for costs in counted):.1f}"
