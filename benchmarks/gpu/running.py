# SPDX-License-Identifier: Apache-2.0
"""Starts the steps, enforces their limits, and reads their results."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import psutil

from benchmarks.gpu import keys
from benchmarks.gpu.engines import engine_arguments
from benchmarks.gpu.plan import RUNNER, Stage, Step
from benchmarks.gpu.recorder import SCRATCH_VARIABLE, recorded
from benchmarks.gpu.results import Figure, StepResult
from benchmarks.measuring.folders import ROOT

PATIENCE: Final = 15.0
"""Seconds that a step has to end its servers before everything it started is killed."""
LEAST_SECONDS: Final = 20.0
"""With less left, no step is begun."""
TEST_KV_GIB: Final = 0.5
TESTS_VARIABLE: Final = "FLASHVLM_TEST_ENGINE"
"""Environment variable of ``tests/engine``: JSON, engine arguments over the tests' own."""

Ended = Callable[[Step, StepResult, Mapping[str, Figure]], None]


def turn_file(folder: Path, step: str) -> Path:
    """Return the file that exists once nothing else runs next to a step."""
    return folder / f"{step}.turn"


@dataclass
class Machine:
    """The resources that steps share."""

    folder: Path
    """The scratch folder."""
    memory_gib: float | None
    """Free on the GPU; None: a rehearsal without one."""
    at_once: int
    """Steps side by side, at most."""
    until: float
    """Monotonic time at which all must have ended."""
    has_triton: bool = True
    """Whether vLLM can use Triton here; its second model runner needs it."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


class Running:
    """A step that was started."""

    def __init__(self, step: Step, machine: Machine, slot: int) -> None:
        self.step = step
        self.slot = slot
        self.begun = time.monotonic()
        self._machine = machine
        self.log = machine.folder / f"{step.name}.log"
        self._junit = machine.folder / f"{step.name}.junit.xml"
        for stale in (self._junit, machine.folder / f"{step.name}.rows.json"):
            stale.unlink(missing_ok=True)
        command = step.command
        environment = {**os.environ, SCRATCH_VARIABLE: str(machine.folder), **step.environment}
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")
        environment.setdefault("HF_HUB_OFFLINE", "1")
        if machine.memory_gib is None:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if step.tests is not None:
            arguments = engine_arguments(
                TEST_KV_GIB, on_gpu=machine.memory_gib is not None, folder=machine.folder
            )
            environment[TESTS_VARIABLE] = json.dumps({**step.tests, **arguments})
            command = [*command, f"--junitxml={self._junit}"]
        if machine.memory_gib is None and machine.at_once > 1:
            # vLLM's threads on a CPU wait in busy loops: engines side by side need their own cores.
            cores = os.cpu_count() or 1
            environment["VLLM_CPU_OMP_THREADS_BIND"] = str(slot % cores)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def result(self) -> tuple[StepResult, dict[str, Figure]]:
        """Read the figures of an ended step, and why it failed if it did."""
        figures, failures = recorded(self._machine.folder, self.step.name)
        if self.step.tests is not None:
            figures |= self._tests()
        code = self._process.wait()
        seconds = round(time.monotonic() - self.begun, 1)
        if code == 0 and not failures:
            return StepResult("done", seconds), figures
        text = "\n\n".join(f"{part}\n{trace}" for part, trace in failures.items())
        text = text or self._last_lines()
        reason = self._root_cause() or _last_line(text) or f"exit status {code}"
        return StepResult("failed", seconds, reason, text), figures

    def stop(self) -> tuple[StepResult, dict[str, Figure]]:
        """End it at its limit, and everything it started."""
        children = self._children()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self._signal(signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self._process.wait()
        figures, failures = recorded(self._machine.folder, self.step.name)
        seconds = round(time.monotonic() - self.begun, 1)
        reason = f"stopped after {seconds:.0f} s"
        text = "\n\n".join([*failures.values(), self._last_lines()])
        return StepResult("stopped", seconds, reason, text), figures

    def _children(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.Error:
            return []

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _tests(self) -> dict[str, Figure]:
        counts = passed_failed_skipped(self._junit)
        if counts is None:
            return {}
        passed, failed, skipped = counts
        seen = f"{passed} passed, {failed} failed, {skipped} skipped"
        if not passed and not failed:
            return {}
        name = keys.of(self.step.name, keys.TESTS)
        return {name: Figure(failed == 0, conditions=seen)}

    def _root_cause(self) -> str:
        """Return the first error that one of vLLM's processes logged: the others follow from it."""
        found = re.search(r"^\(.*\) ERROR .*\] (\w*Error: .*)$", self.log_text(), re.MULTILINE)
        return found[1][:300] if found else ""

    def log_text(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace")

    def _last_lines(self, count: int = 25) -> str:
        lines = self.log_text().splitlines()
        return "\n".join(line[:300] for line in lines[-count:])


def passed_failed_skipped(junit: Path) -> tuple[int, int, int] | None:
    """Count the tests of a JUnit file; None: pytest did not get as far as writing one."""
    try:
        suite = ElementTree.parse(junit).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    if suite is None:
        return None
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return total - failed - skipped, failed, skipped


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def unfit(step: Step, machine: Machine) -> str | None:
    """Return why a step cannot run here; None: it can."""
    if step.environment.get(RUNNER) == "1" and not machine.has_triton:
        return "Model Runner V2 requires Triton, which has no backend for this machine"
    if machine.memory_gib is not None and step.memory_gib > machine.memory_gib:
        needed = int(step.memory_gib * 2**30)
        return f"needs {needed:,} bytes of GPU memory, {machine.memory_gib:.1f} GiB are free"
    if machine.left < LEAST_SECONDS:
        return f"{max(0, machine.left):.0f} s left"
    return None


class Runner:
    """Runs stages one after another."""

    def __init__(self, machine: Machine, ended: Ended) -> None:
        """Start with nothing running.

        Args:
            machine: what there is.
            ended: called after every step, with its result and figures.

        """
        self._machine = machine
        self._ended = ended
        self._early: dict[str, Running] = {}

    def run(self, stage: Stage, following: Stage | None) -> None:
        """Run a stage's steps; those of the following one that start early are started too."""
        running = self._taken_over(stage)
        early = {one.step.name for one in running}
        waiting = [step for step in stage.steps if step.name not in early]
        if stage.timed:
            for step in stage.steps:
                turn_file(self._machine.folder, step.name).touch()
        elif following is not None:
            self._start_early(stage, following)
        at_once = 1 if stage.timed else self._machine.at_once
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running += self._begun(waiting.pop(0), {one.slot for one in running})
                time.sleep(0.1)
                running = [one for one in running if not self._has_ended(one)]
        except BaseException:
            for one in running:
                one.stop()
            raise

    def _taken_over(self, stage: Stage) -> list[Running]:
        """Return the stage's steps that were started early; their limit counts from now."""
        early = [self._early.pop(step.name) for step in stage.steps if step.name in self._early]
        for one in early:
            one.begun = time.monotonic()
        return early

    def _begun(self, step: Step, taken: set[int]) -> list[Running]:
        """Start a step in the first free slot; one that cannot be started is skipped."""
        reason = unfit(step, self._machine)
        if reason is not None:
            self._ended(step, StepResult("skipped", reason=reason), {})
            return []
        slot = next(number for number in itertools.count() if number not in taken)
        return [Running(step, self._machine, slot)]

    def _has_ended(self, one: Running) -> bool:
        """Take in a step that has ended, or stop it at its limit."""
        is_late = time.monotonic() - one.begun > one.step.seconds or self._machine.left < PATIENCE
        if one.is_over:
            result = one.result()
        elif is_late:
            result = one.stop()
        else:
            return False
        self._ended(one.step, *result)
        return True

    def _start_early(self, stage: Stage, following: Stage) -> None:
        """Start servers of the following stage where the GPU holds both stages' engines."""
        free = self._machine.memory_gib
        for step in following.steps:
            largest = sorted((each.memory_gib for each in stage.steps), reverse=True)
            used = sum(largest[: self._machine.at_once]) + step.memory_gib
            if (
                step.early
                and free is not None
                and used <= free
                and unfit(step, self._machine) is None
            ):
                turn_file(self._machine.folder, step.name).unlink(missing_ok=True)
                self._early[step.name] = Running(step, self._machine, slot=0)

    def close(self) -> None:
        """Stop what waits for a turn that does not come."""
        for one in self._early.values():
            one.stop()
        self._early.clear()
