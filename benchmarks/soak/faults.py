# SPDX-License-Identifier: Apache-2.0
"""Requests when a process of the server is killed, the KV cache is full, or processes are doubled.

Each run has its own server, busy with the soak's clients, and takes a few minutes. Its figures are
part of the soak's report. Run from the repository root: ``python -m benchmarks.soak.faults``.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock
from urllib.request import urlopen

import psutil

from benchmarks.measuring.commit import commit
from benchmarks.measuring.metrics import PREEMPTIONS
from benchmarks.measuring.report import say
from benchmarks.soak.calls import Call, finite_calls
from benchmarks.soak.clients import Answer
from benchmarks.soak.expected import Expected
from benchmarks.soak.figures import PAGE, write_fault
from benchmarks.soak.load import Counts, Load, ask_in_turn
from benchmarks.soak.run import FOLDER, start
from benchmarks.soak.verdict import judge
from testing.server import Server

CALLS: Final = 60
CLIENTS: Final = 8
SECONDS: Final = 45
"""Time for which clients keep a server busy."""
DYING: Final = 60
"""Seconds that a server may take to end after one of its processes was killed."""
# Clients that wait for the end of each request.
PATIENT: Final = {"not streamed": 60, "streamed": 30, "invalid": 10}
ALL: Final = {
    **PATIENT,
    "disconnected while reading": 20,
    "cancelled": 15,
    "disconnected while sending": 5,
}

Quiet = dict[Call, Answer]


@dataclass(frozen=True)
class Fault:
    """One run."""

    what: str
    """The fault, as the report describes it."""
    run: Callable[[Quiet], dict[str, Any]]


def figures(counts: Counts, faults: int, seen: str, **more: Any) -> dict[str, Any]:
    """Return what a run adds to the report."""
    return {
        "requests": counts.total,
        "compared": counts.compared,
        "faults": faults,
        "near_ties": counts.near_ties,
        "wrong": len(counts.wrong),
        "lost": len(counts.lost),
        "seen": seen,
        "wrong_answers": counts.wrong[:10],
        "lost_requests": counts.lost[:10],
        **more,
    }


def busy(url: str, quiet: Quiet, shares: dict[str, int], seconds: float = SECONDS) -> Counts:
    """Keep a server busy for some seconds; return the counts of its requests."""

    async def keep() -> Counts:
        load = Load(url, Expected(quiet, {}), clients=CLIENTS, shares=shares)
        running = asyncio.create_task(load.run())
        await asyncio.wait([running], timeout=seconds)
        load.stop()
        await running
        return load.counts

    return asyncio.run(keep())


def kill(title: str, quiet: Quiet) -> dict[str, Any]:
    """Kill a process of a busy server, start another server, and send it the same requests."""
    seen: dict[str, Any] = {}
    with start(f"kill {title}") as server:
        assert server._process is not None
        root = server._process
        victims = processes(root.pid, title)
        if len(victims) != 1:
            raise RuntimeError(f"{len(victims)} processes are called {title}")

        async def strike() -> Counts:
            # No client cancels: each request in flight must get an answer or an error.
            load = Load(server.url, Expected(quiet, {}), clients=CLIENTS, shares=PATIENT)
            running = asyncio.create_task(load.run())
            await asyncio.sleep(SECONDS / 3)
            if load.counts.lost or load.counts.wrong:
                raise RuntimeError(f"wrong before the fault: {load.counts}")
            struck = time.monotonic()
            seen["in_flight"] = load.in_flight
            load.is_dying = True
            load.stop()
            os.kill(victims[0], signal.SIGKILL)
            await asyncio.wait([running], timeout=DYING)
            seen["clients_done_after_s"] = round(time.monotonic() - struck, 1)
            seen["still_waiting"] = load.in_flight
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            return load.counts

        counts = asyncio.run(strike())
        deadline = time.monotonic() + DYING
        while root.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        seen["server_ended"] = root.poll() is not None
        seen["exit_status"] = root.poll()
    begun = time.monotonic()
    with start(f"after {title}") as server:
        seen["seconds_to_restart"] = round(time.monotonic() - begun, 1)
        again = asyncio.run(ask_in_turn(server.url, list(quiet)[::-1]))
    changed = [call.name for call in quiet if judge(quiet[call], again[call]) == "wrong"]
    seen_text = (
        f"of {seen['in_flight']} requests in flight {counts.ended} got an error or a closed "
        f"connection, the last after {seen['clients_done_after_s']} s, and "
        f"{seen['still_waiting']} hung; the server "
        + (f"ended with status {seen['exit_status']}" if seen["server_ended"] else "did not end")
        + f"; another was up after {seen['seconds_to_restart']} s and answered "
        f"{len(again) - len(changed)} of {len(again)} calls as before"
    )
    made = figures(counts, 1, seen_text, **seen)
    made["requests"] += len(again)
    made["wrong"] += len(changed)
    made["lost"] += seen["still_waiting"]
    return made


def processes(root: int, title: str) -> list[int]:
    """Return the ids of a server's processes with a title that vLLM gives them."""
    listed = psutil.Process(root).children(recursive=True)
    return [each.pid for each in listed if title in " ".join(each.cmdline())]


def full_cache(quiet: Quiet) -> dict[str, Any]:
    """Run with a KV cache that one long request fills."""
    # One request of full length fits, and vLLM's null block.
    arguments = ("--block-size", "32", "--num-gpu-blocks-override", "257")
    with start("full", *arguments) as server:
        counts = busy(server.url, quiet, ALL)
        preempted = int(total(server, PREEMPTIONS))
    seen = f"{preempted} preemptions" + ("" if preempted else ": the cache was never full")
    return figures(counts, preempted + sum(counts.faults.values()), seen, preemptions=preempted)


def two_api_servers(quiet: Quiet) -> dict[str, Any]:
    """Run with two API processes."""
    return doubled(quiet, "two api", "APIServer", ("--api-server-count", "2"))


def data_parallel(quiet: Quiet) -> dict[str, Any]:
    """Run with two engines, each on one core."""
    bound = "VLLM_CPU_OMP_THREADS_BIND"
    with mock.patch.dict(os.environ, {bound: "0|1"}):
        return doubled(quiet, "data parallel", "EngineCore", ("--data-parallel-size", "2"))


def doubled(quiet: Quiet, name: str, title: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run with two processes of a kind, and check that both computed."""
    with start(name, *arguments) as server:
        found = processes(server.process_id, title)
        if len(found) != 2:
            raise RuntimeError(f"{len(found)} processes are called {title}")
        before = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in found}
        counts = busy(server.url, quiet, ALL)
        used = [
            round(sum(psutil.Process(pid).cpu_times()[:2]) - spent, 1)
            for pid, spent in before.items()
        ]
    seen = f"{len(found)} processes used {' and '.join(map(str, used))} s of CPU time"
    return figures(counts, sum(counts.faults.values()), seen, seconds_of_work=used)


def total(server: Server, name: str) -> float:
    """Add up a metric over its labels."""
    with urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


FAULTS: Final = {
    "worker killed": Fault(
        "SIGKILL to the worker of a busy server; another is started",
        lambda quiet: kill("Worker", quiet),
    ),
    "engine core killed": Fault(
        "SIGKILL to the engine core of a busy server; another is started",
        lambda quiet: kill("EngineCore", quiet),
    ),
    "full KV cache": Fault("a KV cache for one request of full length, with 8 clients", full_cache),
    "two API servers": Fault("`--api-server-count 2`", two_api_servers),
    "data parallel 2": Fault("`--data-parallel-size 2`", data_parallel),
}


def main() -> int:
    """Run and report; return 1 if an answer was wrong, lost, or a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    options = parser.parse_args()
    measured = commit()
    calls = finite_calls(CALLS, seed=1, huge=False)
    with start("faults quiet") as server:
        quiet = asyncio.run(ask_in_turn(server.url, calls))
    bad = False
    for name in options.only:
        say(name)
        try:
            found = FAULTS[name].run(quiet)
        except Exception as error:
            say(f"{name} could not be run: {error}")
            bad = True
            continue
        say(f"{name}: {found}")
        bad |= bool(found["wrong"] or found["lost"])
        write_fault(FOLDER, name, {"what": FAULTS[name].what, "commit": measured, **found}, PAGE)
    print((FOLDER / "report.md").read_text())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
