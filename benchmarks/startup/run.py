# SPDX-License-Identifier: Apache-2.0
"""Time to start and memory of a server with the plugin named, beside stock vLLM.

Servers of one small model start one after another, in turn with and without the plugin. A start
ends when ``/health`` answers. Memory is that of all processes of the server: the kernel's peaks of
resident memory, added up. ``python -m benchmarks.startup.run --check``.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import psutil

from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.pairs import FEWEST_ROUNDS
from benchmarks.measuring.report import machine, say
from benchmarks.measuring.servers import confirm, server
from benchmarks.soak.memory import mib
from benchmarks.startup.figures import Runs, marks, report
from testing.tiny.llava import build_llava

SETUPS: Final = {"stock": False, "flashvlm": True}


def start(name: str) -> dict[str, float]:
    """Start one server; return how long it took and its memory."""
    model = build_llava(MODELS / "idle-llava", hidden=512, layers=8)
    before = time.monotonic()
    described = server(model, plugin=SETUPS[name], log=scratch("startup") / f"{name}.log")
    with described as running:
        seconds = time.monotonic() - before
        first = psutil.Process(running.process_id)
        peaks = [mib(each.pid, "VmHWM") for each in (first, *first.children(recursive=True))]
        confirm(running.url, plugin=SETUPS[name])
        return {"seconds": seconds, "mib": sum(peaks)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write results and tables."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="starts of each server")
    asked = parser.parse_args(arguments)
    if asked.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}: fewer make no 95 % interval")
    stop_servers_on_sigterm()
    settings: dict[str, Any] = {**machine(), "rounds": asked.rounds}
    for name in SETUPS:
        start(name)  # fills the caches of files
    runs: Runs = {name: [] for name in SETUPS}
    for index in range(asked.rounds):
        for name in list(SETUPS)[:: 1 if index % 2 else -1]:
            runs[name].append(start(name))
            say(f"round {index + 1}/{asked.rounds}, {name}: {runs[name][-1]}")
    folder = asked.output or committed("startup")
    return publish(folder, settings, {"runs": runs}, marks(runs), report(runs), check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
