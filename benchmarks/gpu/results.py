# SPDX-License-Identifier: Apache-2.0
"""The results file: figures, their steps, and their machines.

A later run replaces the figures that it measured again and leaves all others, so every figure
names its run. A step that failed takes no earlier figure away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

RESULTS: Final = Path(__file__).parent / "results.json"
"""The committed one."""

Value = float | bool | str
Status = Literal["done", "failed", "stopped", "skipped"]


@dataclass(frozen=True)
class Figure:
    """Something measured (a number), checked (true or false) or seen (text)."""

    value: Value
    unit: str = ""
    conditions: str = ""
    step: str = ""
    run: int = 0
    """Number of the run in `Results.runs`; 0 before a run has taken it in."""


@dataclass(frozen=True)
class StepResult:
    """The end of a step."""

    status: Status
    seconds: float = 0.0
    reason: str = ""
    """Why it was skipped or stopped, or the last line of what made it fail."""
    traceback: str = ""
    run: int = 0


@dataclass
class Results:
    """The results of all runs."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    """A machine and a commit each; a run's number is its index plus one."""
    steps: dict[str, StepResult] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def begin(self, machine: Mapping[str, Any]) -> int:
        """Add a run and return its number."""
        self.runs.append(dict(machine))
        return len(self.runs)

    def take(self, step: str, result: StepResult, figures: Mapping[str, Figure]) -> None:
        """Add the results of a step of the newest run.

        A skipped step changes nothing if the step is known: nothing was tried.
        """
        run = len(self.runs)
        if result.status == "skipped" and step in self.steps:
            return
        self.steps[step] = replace(result, run=run)
        for name, figure in figures.items():
            self.figures[name] = replace(figure, step=figure.step or step, run=run)

    def number(self, name: str) -> float | None:
        """Return a figure's number; None: not measured, or not a number."""
        found = self.figures.get(name)
        if found is None or isinstance(found.value, bool | str):
            return None
        return float(found.value)

    def machine_of(self, figure: Figure) -> dict[str, Any]:
        """Return the run that a figure came from."""
        return self.runs[figure.run - 1]

    def is_done(self, step: str) -> bool:
        """Whether the step has succeeded in some run."""
        return step in self.steps and self.steps[step].status == "done"

    def as_json(self) -> dict[str, Any]:
        """Return everything, as the file has it."""
        return {
            "runs": self.runs,
            "steps": {name: asdict(each) for name, each in self.steps.items()},
            "figures": {name: asdict(each) for name, each in self.figures.items()},
        }

    def write(self, path: Path) -> None:
        """Replace the file in one move: a run can be ended at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        os.replace(beside, path)


def read(path: Path = RESULTS) -> Results:
    """Read a results file; without one there are no results yet."""
    if not path.exists():
        return Results()
    found = json.loads(path.read_text())
    return Results(
        found["runs"],
        {name: StepResult(**each) for name, each in found["steps"].items()},
        {name: Figure(**each) for name, each in found["figures"].items()},
    )
