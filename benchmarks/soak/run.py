# SPDX-License-Identifier: Apache-2.0
"""Correct answers and stable memory, for an hour under load with faulty clients.

A server without load gets a finite set of requests one by one. Another server gets them from many
clients at once, mixed with new images, invalid requests and clients that cancel or disconnect.
Every answer is compared with the one without load. Run from the repository root:
``python -m benchmarks.soak.run --minutes 60``.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.commit import commit
from benchmarks.measuring.folders import committed, scratch
from benchmarks.measuring.metrics import MetricsError, page, value
from benchmarks.measuring.report import machine, say
from benchmarks.measuring.servers import server
from benchmarks.soak.allocators import (
    ALLOCATORS,
    GLIBC,
    JEMALLOC,
    MissingAllocatorError,
    variables,
)
from benchmarks.soak.bodies import EXPLAIN
from benchmarks.soak.calls import Call, explained, finite_calls, fresh_call
from benchmarks.soak.clients import Answer, LostError
from benchmarks.soak.expected import UNDER_LOAD, WAITING, Expected, reduced_calls
from benchmarks.soak.families import FAMILIES
from benchmarks.soak.figures import PAGE, soak_is_well, write
from benchmarks.soak.load import Load, ask_in_turn, routes
from benchmarks.soak.memory import Peaks, ends
from benchmarks.soak.verdict import judge
from testing.server import Server

FOLDER: Final = committed("soak")
SCRATCH: Final = scratch("soak")
POSITIONS: Final = 7168
"""Enough for three unpruned images and a question of 4,000 words, not for five images. They are
rotary positions, so the checkpoints have no table of them."""
ARGUMENTS: Final = (
    *("--max-model-len", str(POSITIONS)),
    *("--hf-overrides", json.dumps({"text_config": {"max_position_embeddings": POSITIONS}})),
    # 56 blocks a request of full length: the caches are full within a minute, so that they do not
    # explain memory that grows later.
    *("--num-gpu-blocks-override", "512", "--block-size", "128"),
    *("--mm-processor-cache-gb", "0.1", "--visual-feature-cache-gb", "0.05"),
    # Batches of conversations are among vLLM's own optional routes.
    "--enable-scale-out",
    *("--visual-explain-per-minute", "100000"),
    *("--visual-budget-min", "4", "--visual-budget-max", "500"),
    *("--uvicorn-log-level", "warning"),
)
LOADED: Final = ("--visual-budget-under-load", f"{UNDER_LOAD}:{WAITING}")
"""Options of the server under load only."""
LOOK: Final = 5.0
"""Seconds between two samples of private memory."""
WARM_UP: Final = 5
"""Minutes before memory is measured."""
SHORTEST: Final = 10
"""Minutes from which a run is written to the committed report."""
CHECKED_NEW: Final = 2000
"""The most new requests that are repeated afterwards on a server without load."""


def start(name: str, *more: str, allocator: str = GLIBC, family: str = "llava") -> Server:
    """Return a server of a tiny model, not started."""
    return server(
        FAMILIES[family].build(),
        plugin=True,
        log=SCRATCH / f"{name}.log",
        arguments=[*ARGUMENTS, *more],
        environment=variables(allocator),
    )


def quiet_answers(
    calls: list[Call], allocator: str, family: str
) -> tuple[dict[Call, Answer], list[Call], list[str]]:
    """Send everything to a server without load twice, the second time in reverse order.

    Returns:
        The answers, the requests to the explain route, and the names of requests with two different
        answers. Unless that list is empty, later comparisons have no meaning.
    """
    with start("quiet", allocator=allocator, family=family) as quiet:
        explain = explained(calls) if EXPLAIN in asyncio.run(routes(quiet.url)) else []
        first = asyncio.run(ask_in_turn(quiet.url, [*calls, *explain]))
        again = asyncio.run(ask_in_turn(quiet.url, [*explain, *calls][::-1]))
    unstable = [call.name for call in first if judge(first[call], again[call]) != "right"]
    return first, explain, unstable


async def soak(
    url: str, load: Load, peaks: Peaks, minutes: int, progress: Path
) -> list[dict[str, Any]]:
    """Run the clients for some minutes; return the figures of each minute."""
    lines: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, load.stop)
    running = asyncio.create_task(load.run())
    peaks.begin()
    begun = time.monotonic()
    counts = load.counts
    before = 0
    with progress.open("w") as file:
        for minute in range(1, minutes + 1):
            while not running.done() and time.monotonic() < begun + 60 * minute:
                await asyncio.wait([running], timeout=LOOK)
                peaks.look()
            line = {
                "minute": minute,
                "requests": counts.total - before,
                "peak_mib": {name: round(peak, 1) for name, peak in peaks.take().items()},
                "own_mib": {name: round(own[-1], 1) for name, own in peaks.own_by_process.items()},
                "near_ties": counts.near_ties,
                "wrong": len(counts.wrong),
                "lost": len(counts.lost),
            }
            before = counts.total
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            say(json.dumps(line))
            found = {"wrong": counts.wrong, "lost": counts.lost, "faults": counts.faults}
            progress.with_name("found.json").write_text(json.dumps(found, indent=1))
            if running.done():
                break
    load.stop()
    await running
    return lines


def is_idle(url: str) -> bool:
    """Return whether the engine has released every request, cancelled ones included."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = page(url)
        if not value(found, "vllm:num_requests_running") + value(
            found, "vllm:num_requests_waiting"
        ):
            return value(found, "vllm:kv_cache_usage_perc") == 0
        time.sleep(0.5)
    return False


def check_new(url: str, loaded: dict[int, Answer]) -> tuple[int, list[dict[str, Any]], int]:
    """Repeat new requests on a server without load.

    Returns:
        how many, the wrong answers, and the number of near ties.
    """
    chosen = sorted(random.Random(0).sample(sorted(loaded), min(CHECKED_NEW, len(loaded))))
    again = asyncio.run(ask_in_turn(url, [fresh_call(number) for number in chosen]))
    wrong, ties = [], 0
    for number, (call, quiet) in zip(chosen, again.items(), strict=True):
        verdict = judge(quiet, loaded[number])
        ties += verdict == "near tie"
        if verdict == "wrong":
            loud = loaded[number]
            wrong.append(
                {
                    "call": call.name,
                    "kind": "new",
                    "expected": [quiet.status, quiet.counts, quiet.text],
                    "got": [loud.status, loud.counts, loud.text],
                    "leads": [round(lead, 5) for _, lead in quiet.margins],
                }
            )
    return len(chosen), wrong, ties


def memory_figures(
    peaks: dict[str, list[float]], own: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Compare the ends of a run, process by process; empty for a short one."""
    figures = {}
    for name, minutes in peaks.items():
        resident = ends(minutes, WARM_UP, max)
        its_own = ends(own[name], WARM_UP, statistics.median)
        if resident is not None and its_own is not None:
            figures[name] = {
                "first_mib": round(resident.first, 1),
                "last_mib": round(resident.last, 1),
                "ratio": round(resident.ratio, 4),
                "own_first_mib": round(its_own.first, 1),
                "own_last_mib": round(its_own.last, 1),
                "own_ratio": round(its_own.ratio, 4),
            }
    return figures


def quantile(values: list[float], share: float) -> float | None:
    """Return a quantile; None without values."""
    ordered = sorted(values)
    return round(ordered[int(len(ordered) * share)], 2) if ordered else None


def main() -> int:
    """Run and report; return 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--calls", type=int, default=240, help="requests in the finite set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--section", help="of the report; default: the family")
    parser.add_argument("--family", choices=list(FAMILIES), default="llava")
    parser.add_argument("--allocator", choices=list(ALLOCATORS), default=JEMALLOC)
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("--minutes is 1 or more")
    try:
        variables(options.allocator)
    except MissingAllocatorError as error:
        parser.error(str(error))

    measured = commit()
    chosen = {"allocator": options.allocator, "family": options.family}
    calls = finite_calls(options.calls, videos=FAMILIES[options.family].has_videos)
    reduced = reduced_calls(calls)
    say(f"{len(calls)} requests to a server without load, twice")
    quiet, explain, unstable = quiet_answers([*calls, *reduced], **chosen)
    refused = [(call.name, a.status, a.text[:300]) for call, a in quiet.items() if a.status != 200]
    (SCRATCH / "quiet.json").write_text(
        json.dumps(
            [[call.name, a.status, a.counts, a.text[:200]] for call, a in quiet.items()], indent=1
        )
    )
    if refused:
        sys.exit(f"the server without load refused valid requests: {refused}")
    say(f"requests with two different answers: {unstable}")

    quiet_reduced = {call: quiet.pop(call) for call in reduced}
    with start("loud", *LOADED, **chosen) as loud:
        peaks = Peaks(loud.process_id)

        expected = Expected(quiet, quiet_reduced)

        async def under_load() -> tuple[Load, list[dict[str, Any]]]:
            load = Load(
                loud.url,
                expected,
                clients=options.clients,
                seed=options.seed,
                explained=explain,
            )
            lines = await soak(loud.url, load, peaks, options.minutes, SCRATCH / "minutes.jsonl")
            return load, lines

        load, lines = asyncio.run(under_load())
        counts = load.counts
        idle = after = None
        try:
            idle = is_idle(loud.url)
            say("the load is over; the same requests once more, one by one")
            after = asyncio.run(ask_in_turn(loud.url, list(quiet)[::-1]))
        except (LostError, OSError, MetricsError) as error:
            # The report counts all of these answers as changed; the figures before remain valid.
            say(f"the requests after the load failed: {error!r}")
            counts.lost.append({"call": "afterwards", "error": repr(error)})
        changed = [
            call.name
            for call in quiet
            if after is None or judge(quiet[call], after[call]) == "wrong"
        ]
        saved = SCRATCH / "metrics.txt"
        with contextlib.suppress(Exception):
            saved.write_text(json.dumps({name: one[0] for name, one in page(loud.url).items()}))
    with start("repeat", **chosen) as repeat:
        checked, wrong, ties = check_new(repeat.url, counts.new)

    memory = memory_figures(peaks.by_process, peaks.own_by_process)
    figures: dict[str, Any] = {
        "commit": measured,
        "machine": machine(),
        "minutes": len(lines),
        "clients": options.clients,
        "allocator": options.allocator,
        "family": options.family,
        "finite_set": len(quiet),
        "requests": counts.total,
        "by_kind": dict(counts.requests.most_common()),
        "faults": sum(counts.faults.values()),
        "faults_by_kind": counts.faults,
        "compared": counts.compared + checked,
        "new_compared": checked,
        "under_load": expected.under_load,
        "near_ties": counts.near_ties + ties,
        "wrong": len(counts.wrong) + len(wrong),
        "lost": len(counts.lost),
        "unstable_when_quiet": unstable,
        "changed_afterwards": changed,
        "idle_afterwards": idle,
        "seconds": {
            "median": quantile(counts.seconds, 0.5),
            "99th": quantile(counts.seconds, 0.99),
        },
        "memory": memory,
        "by_minute": lines,
        "wrong_answers": [*counts.wrong, *wrong][:40],
        "lost_requests": counts.lost[:40],
    }
    is_long = options.minutes >= SHORTEST
    folder = FOLDER if is_long else SCRATCH
    write(folder, options.section or options.family, figures, PAGE if is_long else None)
    print((folder / "report.md").read_text())
    return 0 if soak_is_well(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
