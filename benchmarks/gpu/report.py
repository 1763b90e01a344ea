# SPDX-License-Identifier: Apache-2.0
"""The report: targets, every figure with its conditions, every failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import marks
from benchmarks.gpu.plan import stages
from benchmarks.gpu.results import Figure, Results
from benchmarks.measuring.report import Mark, table

WRITTEN = "Written by `python -m benchmarks.gpu.run`."


def write_report(results: Results, folder: Path, *, draw: bool = False) -> None:
    """Write ``report.md``, and with ``draw`` the plot, if there are figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report(results))
    if draw and results.figures:
        try:
            from benchmarks.gpu.plot import plot
        except ImportError as error:  # Matplotlib may be missing on the machine of the GPU
            print(f"no plot: {error}; draw it elsewhere with --redraw")
            return
        plot(results, folder / "plot.png")


def report(results: Results) -> str:
    """Return the whole report as Markdown."""
    judged = marks(results)
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->\n# GPU report",
        WRITTEN + " " + summary(judged),
    ]
    if any(run["rehearsal"] for run in results.runs):
        parts.append(
            "**A rehearsal: tiny models, few requests. Its figures say nothing about speed.**"
        )
    parts += ["## Machines", machines(results), "## Targets", targets_table("target", judged)]
    for stage in stages(rehearsal=False):
        names = [step.name for step in stage.steps]
        rows = [each for each in results.figures.items() if each[1].step in names]
        known = [name for name in names if name in results.steps]
        if rows or known:
            parts += [f"## {stage.title}", *_stage(results, known, rows)]
    return "\n\n".join(parts) + "\n"


def summary(judged: list[Mark]) -> str:
    """Count the targets."""
    met = sum(mark.met is True for mark in judged)
    missed = sum(mark.met is False for mark in judged)
    return f"{met} targets met, {missed} missed, {len(judged) - met - missed} not run."


def machines(results: Results) -> str:
    """Return a table of the runs; figures refer to them by number."""
    if not results.runs:
        return "No benchmark has run on a GPU yet. `make gpu-report` runs them."
    used = {each.run for each in results.figures.values()}
    used |= {each.run for each in results.steps.values()}
    rows = [
        (
            number,
            run["date"],
            run["gpu"] or "none (rehearsal on a CPU)",
            f"{run['memory_gib']} GiB" if run["memory_gib"] else "",
            run["driver"] or "",
            f"{run['vllm']}, torch {run['torch']}, CUDA {run['cuda']}, Triton {run['triton']}",
            run["commit"] or "unknown",
        )
        for number, run in enumerate(results.runs, 1)
        if number in used
    ]
    return table(("run", "date", "GPU", "memory", "driver", "vLLM", "commit"), rows)


def targets_table(head: str, judged: Sequence[Mark]) -> str:
    """Return a table of targets; the last column is empty for those that were not run."""
    words = {True: "met", False: "**missed**", None: ""}
    return table((head, "measured", ""), [(m.asked, m.found, words[m.met]) for m in judged])


def _stage(results: Results, steps: list[str], rows: list[tuple[str, Figure]]) -> Iterator[str]:
    shown = [(name, results.steps[name]) for name in steps]
    yield table(
        ("step", "run", "", "seconds", "reason"),
        [
            (name, each.run, each.status, f"{each.seconds:.0f}", _cell(each.reason))
            for name, each in shown
        ],
    )
    if rows:
        yield table(
            ("figure", "value", "conditions", "run"),
            [(name, _value(figure), _cell(figure.conditions), figure.run) for name, figure in rows],
        )
    for name, each in shown:
        if each.traceback and each.status in ("failed", "stopped"):
            title = f"<summary>{name}: {each.status}</summary>"
            yield f"<details>{title}\n\n```\n{each.traceback}\n```\n</details>"


def _value(figure: Figure) -> str:
    if isinstance(figure.value, bool):
        return "yes" if figure.value else "**no**"
    return f"{figure.value} {figure.unit}".strip()


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
