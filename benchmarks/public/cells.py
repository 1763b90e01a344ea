# SPDX-License-Identifier: Apache-2.0
"""One cell of a table: its lmms-eval command, and the results."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.folders import ROOT
from benchmarks.public.tables import Table, Task
from flashvlm_vllm.request.budget import Budget

TASKS: Final = "benchmarks/public/tasks"
BATCH: Final = 64
"""Conversations per call of ``LLM.chat``; the engine schedules among them."""


@dataclass(frozen=True)
class Setting:
    """A row of a table; without a budget there is nothing to select."""

    budget: Budget | None
    selector: str | None

    @property
    def name(self) -> str:
        """The name of the row and of its folder."""
        return "none" if self.budget is None else f"{self.selector}-{self.budget}"


def settings(budgets: Sequence[Budget | None], selectors: Sequence[str]) -> list[Setting]:
    """List every row once: no pruning is one row, however many selectors there are."""
    rows = [
        Setting(budget, None if budget is None else selector)
        for budget in budgets
        for selector in selectors
    ]
    return list(dict.fromkeys(rows))


@dataclass(frozen=True)
class Target:
    """What is measured: the server at ``server``, or an ``LLM(...)`` of ``model``."""

    server: str | None = None
    model: str | None = None
    extra: str = ""
    """Further model arguments, as lmms-eval writes them."""

    def model_arguments(self, setting: Setting, table: Table, report: Path) -> list[str]:
        """Return lmms-eval's flags for the model."""
        arguments: dict[str, object] = {}
        if self.server is not None:
            arguments["base_url"] = f"{self.server.rstrip('/').removesuffix('/v1')}/v1"
        if self.model is not None:
            arguments["model"] = self.model
        arguments["visual_budget"] = "none" if setting.budget is None else setting.budget
        if setting.selector is not None:
            arguments["visual_selector"] = setting.selector
        if table.frames is not None:
            arguments["nframes" if self.server is None else "max_frames_num"] = table.frames
        arguments["report"] = report
        parts = [f"{name}={value}" for name, value in arguments.items()]
        if self.extra:
            parts.append(self.extra)
        if self.server is None:
            flags = ["--model", "flashvlm_llm", "--batch_size", str(BATCH)]
        else:
            flags = ["--model", "flashvlm_server"]
        return [*flags, "--model_args", ",".join(parts)]

    @property
    def environment(self) -> dict[str, str]:
        """Additional environment variables of lmms-eval's process."""
        return {"VLLM_PLUGINS": "flashvlm"} if self.server is None else {}


@dataclass
class Cell:
    """One task under one setting."""

    task: Task
    setting: Setting
    folder: Path
    command: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int | None = None
    costs: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None

    @property
    def score(self) -> float | None:
        """The task's figure for the table."""
        value = self.metrics.get(self.task.metric)
        return None if value is None else value * self.task.scale

    def run(self, environment: dict[str, str]) -> None:
        """Run lmms-eval and read its results; a failure becomes ``error``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics, self.samples, self.costs, self.error = {}, None, {}, None
        # Of an earlier run; lmms-eval adds files and never removes any.
        for old in [*self.folder.rglob("*_results.json"), self.folder / "costs.json"]:
            old.unlink(missing_ok=True)
        missing = [name for name in self.task.needs if not os.environ.get(name)]
        if missing:
            self.error = f"not run: this task needs {', '.join(missing)} in the environment"
            return
        log = self.folder / "log.txt"
        start = time.monotonic()
        with log.open("w") as output:
            ended = subprocess.run(
                self.command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        self.seconds = round(time.monotonic() - start, 1)
        # lmms-eval also exits with 0 when it fails; only its results show whether it did.
        if not self.read():
            self.error = f"exit status {ended.returncode}, {_last_error(log)}"

    def read(self) -> bool:
        """Read the results of an earlier or just ended run; False if there are none."""
        found = sorted(self.folder.rglob("*_results.json"))
        if not found:
            return False
        results = json.loads(found[-1].read_text())
        self.metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in results["results"][self.task.name].items()
            if key.endswith(",none") and isinstance(value, int | float)
        }
        self.samples = results["n-samples"][self.task.name]["effective"]
        costs = self.folder / "costs.json"
        self.costs = json.loads(costs.read_text()) if costs.exists() else {}
        if self.costs.get("failed"):
            self.error = f"{self.costs['failed']} requests failed and count as wrong"
        if self.score is None:
            self.error = f"no {self.task.metric} among {', '.join(self.metrics)}"
        return True


def plan(
    table: Table,
    target: Target,
    rows: Sequence[Setting],
    folder: Path,
    python: str,
    limit: int | None = None,
) -> list[Cell]:
    """List a table's cells, row by row; tasks that lmms-eval does not have are left out."""
    cells = []
    for row in rows:
        for task in table.tasks:
            if task.name is None:
                continue
            place = folder / row.name / task.name
            shown = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
            command = [python, "-m", "lmms_eval"]
            command += target.model_arguments(row, table, shown / "costs.json")
            command += ["--tasks", task.name, "--include_path", TASKS]
            if limit is not None:
                command += ["--limit", str(limit)]
            command += ["--log_samples", "--output_path", str(shown)]
            cells.append(Cell(task, row, place, command))
    return cells


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line and not line.startswith("\x1b")]
    line = (errors or lines or ["no output"])[-1].strip()
    return f"{line[:300]} (complete log: {log})"
