# SPDX-License-Identifier: Apache-2.0
"""Writes each figure of a step at once, because the step may be stopped at any time."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from benchmarks.gpu.results import Figure, Value

SCRATCH_VARIABLE: Final = "FLASHVLM_GPU_SCRATCH"
"""Environment variable: the folder that the steps of one run share."""


def scratch() -> Path:
    """Return the folder that the steps of this run share."""
    folder = Path(os.environ.get(SCRATCH_VARIABLE, "benchmarks/output/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Recorder:
    """Figures of one step, and the tracebacks of the parts of it that failed."""

    def __init__(self, step: str, conditions: str = "") -> None:
        """Start with nothing.

        Args:
            step: its name in the plan.
            conditions: what holds for all of its figures, unless a figure says otherwise.

        """
        self.step = step
        self._conditions = conditions
        self._figures: dict[str, Figure] = {}
        self._failures: dict[str, str] = {}
        self._path = scratch() / f"{step}.rows.json"
        self._begun = time.monotonic()
        self._write()

    def figure(
        self, name: str, value: Value, unit: str = "", conditions: str | None = None
    ) -> None:
        """Add a figure, or replace it."""
        shown = self._conditions if conditions is None else conditions
        self._figures[name] = Figure(value, unit, shown, self.step)
        self._say(f"{name}: {value} {unit}")
        self._write()

    def check(self, name: str, holds: bool, seen: object = "") -> None:
        """Add a check with its result and an observation."""
        shown = str(seen) if not self._conditions else f"{self._conditions}; {seen}"
        self.figure(name, bool(holds), conditions=shown)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part of the step; a failure is recorded, and the step continues."""
        try:
            yield
        except Exception:
            self._failures[name] = shortened(traceback.format_exc())
            self._say(f"failed: {name}\n{self._failures[name]}")
            self._write()

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return list(self._failures)

    def finish(self) -> int:
        """Return the step's exit status: 1 if a part of it failed."""
        return 1 if self._failures else 0

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._begun:6.1f} s] {line}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        rows = {
            "figures": {name: asdict(each) for name, each in self._figures.items()},
            "failures": self._failures,
        }
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(beside, self._path)


def shortened(text: str, first: int = 40, last: int = 20, width: int = 300) -> str:
    """Cut a traceback down to what a report can hold: torch's messages have screens of their own.

    Args:
        text: the traceback.
        first: lines kept of its begin.
        last: lines kept of its end.
        width: characters kept of a line.

    """
    lines = [line[:width] for line in text.splitlines()]
    if len(lines) > first + last:
        lines = [*lines[:first], f"... {len(lines) - first - last} lines ...", *lines[-last:]]
    return "\n".join(lines)


def recorded(folder: Path, step: str) -> tuple[dict[str, Figure], dict[str, str]]:
    """Read a step's figures and the tracebacks of its failed parts."""
    path = folder / f"{step}.rows.json"
    if not path.exists():
        return {}, {}
    rows = json.loads(path.read_text())
    return {name: Figure(**each) for name, each in rows["figures"].items()}, rows["failures"]
