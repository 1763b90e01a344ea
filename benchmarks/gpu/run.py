# SPDX-License-Identifier: Apache-2.0
"""Measure this machine's GPU and write the report: ``python -m benchmarks.gpu.run``.

Run from the repository root, or as ``make gpu-report``. Stages run in order of value, those that
the results file lacks first; after every step ``results.json`` and ``report.md`` are up to date.
``--rehearse`` runs the same stages on a CPU with tiny models, to find errors of this program.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.gpu.comparing import compare_answers
from benchmarks.gpu.machine import GPU, describe, find_gpu
from benchmarks.gpu.pages import fill
from benchmarks.gpu.plan import Stage, Step, stages
from benchmarks.gpu.recorder import SCRATCH_VARIABLE
from benchmarks.gpu.report import write_report
from benchmarks.gpu.results import RESULTS, Figure, Results, StepResult, read
from benchmarks.gpu.running import Machine, Runner
from benchmarks.gpu.stand_ins import put_in_place
from benchmarks.measuring.command import stop_servers_on_sigterm
from benchmarks.measuring.folders import scratch
from flashvlm_vllm.vllm_releases import UnsupportedVLLMError, check_vllm

MINUTES: Final = 9.0
SCRATCH: Final = scratch("gpu")
NO_GPU: Final = (
    "no NVIDIA GPU found; `make gpu-rehearsal` (python -m benchmarks.gpu.run --rehearse) runs the "
    "same stages on the CPU"
)


def in_order(chosen: Sequence[Stage], known: Results) -> list[Stage]:
    """Return stages that have a step without results before those that have none missing."""
    missing = [each for each in chosen if not all(known.is_done(s.name) for s in each.steps)]
    return missing + [each for each in chosen if each not in missing]


class Report:
    """The results of this and earlier runs, written after every step."""

    def __init__(self, folder: Path, scratch: Path, results: Results) -> None:
        self.results = results
        self._folder = folder
        self._scratch = scratch

    def ended(self, step: Step, result: StepResult, figures: Mapping[str, Figure]) -> None:
        """Add the results of a step that has ended."""
        # Two engines can be compared when the later one has ended.
        found = {**figures, **compare_answers(self._scratch)}
        self.results.take(step.name, result, found)
        why = f": {result.reason}" if result.reason else ""
        say(f"{step.name}: {result.status} after {result.seconds:.0f} s{why}")
        if step.name == "operators":
            put_in_place(self._scratch)
        self.write()

    def write(self) -> None:
        """Write the results file and the report."""
        self.results.write(self._folder / "results.json")
        write_report(self.results, self._folder)


def say(line: str) -> None:
    """Report progress apart from the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen stages; return 2 where they cannot be run at all."""
    names = [stage.name for stage in stages(rehearsal=False)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (9)")
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=str(names))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--output", type=Path, help="folder of results.json, report.md, plot.png")
    parser.add_argument(
        "--redraw", action="store_true", help="write report, plot and pages; measure nothing"
    )
    asked = parser.parse_args(arguments)
    folder = asked.output or (SCRATCH / "rehearsal" if asked.rehearse else RESULTS.parent)
    if asked.redraw:
        write_report(read(folder / "results.json"), folder, draw=True)
        fill()
        return 0
    until = time.monotonic() + 60 * asked.minutes

    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        print(error, file=sys.stderr)
        return 2
    gpu = find_gpu()
    if gpu is None and not asked.rehearse:
        print(NO_GPU, file=sys.stderr)
        return 2

    stop_servers_on_sigterm()
    chosen = [
        stage
        for stage in stages(rehearsal=asked.rehearse)
        if asked.stages is None or stage.name in asked.stages
    ]
    return measure(chosen, folder, gpu, until, rehearse=asked.rehearse)


def measure(
    chosen: Sequence[Stage], folder: Path, gpu: GPU | None, until: float, *, rehearse: bool
) -> int:
    """Run stages until the time is up; return 1 if a step failed or was stopped."""
    scratch = SCRATCH / ("rehearsal-scratch" if rehearse else "scratch")
    os.environ[SCRATCH_VARIABLE] = str(scratch)
    for stale in (*scratch.glob("*.log"), *scratch.glob("*.answers.json")):
        stale.unlink()
    scratch.mkdir(parents=True, exist_ok=True)
    results = read(folder / "results.json")
    results.begin(describe(gpu, rehearsed=rehearse))
    report = Report(folder, scratch, results)
    cores = os.cpu_count() or 1
    machine = Machine(
        scratch,
        None if gpu is None else gpu.free_bytes / 2**30,
        at_once=cores if gpu is None else max(2, cores // 2),
        until=until,
        has_triton=has_triton(),
    )
    runner = Runner(machine, report.ended)
    ordered = in_order(chosen, results)
    try:
        for place, stage in enumerate(ordered):
            say(f"stage {stage.name}: {stage.title}")
            runner.run(stage, ordered[place + 1] if place + 1 < len(ordered) else None)
    finally:
        runner.close()
        report.write()
        keep_logs(scratch, folder)
        write_report(results, folder, draw=True)
        if folder == RESULTS.parent:
            fill()
    say(f"report: {folder / 'report.md'}")
    now = [each for each in results.steps.values() if each.run == len(results.runs)]
    return 1 if any(each.status in ("failed", "stopped") for each in now) else 0


def has_triton() -> bool:
    """Whether vLLM finds a Triton with a backend for this machine."""
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def keep_logs(scratch: Path, folder: Path) -> None:
    """Copy the logs next to a report in another folder, which may not contain all errors."""
    if folder == RESULTS.parent:
        return
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for log in (*scratch.glob("*.log"), *scratch.glob("*.junit.xml"), *scratch.glob("*.rows.json")):
        shutil.copy(log, logs / log.name)


if __name__ == "__main__":
    sys.exit(main())
