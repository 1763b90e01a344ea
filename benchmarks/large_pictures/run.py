# SPDX-License-Identifier: Apache-2.0
"""One picture of 16,384 visual tokens, and what everyone else waits for it.

Run from the repository root: ``python -m benchmarks.large_pictures.run --check``. A server without
the plugin and one with it are up in turn. Each is asked about a new picture for every row, while
eight other clients ask about small ones again and again.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from PIL import ImageDraw

from benchmarks.large_pictures.model import CONTEXT, SIDE, TOKENS, build
from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.report import Mark, machine, marks_table, missed, say, table, write
from benchmarks.measuring.servers import MODEL_NAME, server
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import data_url, photo
from testing.server import Server

HERE: Final = Path(__file__).parent
OUTPUT: Final = HERE.parent / "output" / "large_pictures"
BUDGET: Final = 1024
TOWERS: Final = {
    "two layers": (2, [1]),
    "32 layers": (32, [7, 15, 23, 31]),
}
MOST_TIMES: Final = {"two layers": 1.3, "32 layers": 1.0}
"""How long a request may take, of stock's time."""
MOST_MEMORY: Final = 512
"""MiB that a worker may need beyond stock's."""
OTHERS: Final = 8
"""Clients that ask about small pictures meanwhile."""
WARM_UP: Final = 89
QUESTION: Final = "what color is the suit?"


@dataclass(frozen=True)
class Row:
    """One request about a large picture."""

    tower: str
    name: str
    seconds: float
    """Until its one token."""
    others: float
    """Of the slowest request of the other clients meanwhile, in seconds."""
    peak: float
    """Of the server's largest process while it ran, in MiB."""


def main() -> int:
    """Measure, print, write; return 1 when asked to check and a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--selectors", nargs="+", choices=BUILT_IN, default=list(BUILT_IN))
    parser.add_argument("--rounds", type=int, default=1, help="each row is the median of so many")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a mark is missed")
    asked = parser.parse_args()
    about = machine()
    rows: list[Row] = []
    for tower in asked.towers:
        rows += measure(tower, asked.selectors, asked.rounds)
    found = marks(rows)
    asked.output.mkdir(parents=True, exist_ok=True)
    settings = {"machine": about, "tokens": TOKENS, "budget": BUDGET, "rounds": asked.rounds}
    figures = {"rows": [asdict(row) for row in rows]}
    write(asked.output / "results.json", settings, figures, found)
    report = "\n\n".join([marks_table(found), *(rows_table(rows, each) for each in asked.towers)])
    (asked.output / "tables.md").write_text(report + "\n")
    print(report)
    return 1 if missed(found) and asked.check else 0


def measure(tower: str, selectors: Sequence[str], rounds: int) -> list[Row]:
    """Ask a stock server, then one with the plugin without a budget and by these selectors."""
    model = build(Path(".models") / f"large-{tower.replace(' ', '-')}", *TOWERS[tower])
    limits = ("--max-model-len", str(CONTEXT))
    rows = []
    for plugin in (False, True):
        log = OUTPUT / f"{tower.replace(' ', '-')}-{'plugin' if plugin else 'stock'}.log"
        with server(model, plugin=plugin, log=log, arguments=limits) as running:
            asks: dict[str, dict[str, Any]] = {("no budget" if plugin else "stock"): {}}
            if plugin:
                asks |= {
                    name: {"visual_budget": BUDGET, "visual_selector": name} for name in selectors
                }
            # The first large picture pays for memory that the process then keeps.
            ask(running.url, MODEL_NAME, [user(QUESTION, large_picture(WARM_UP))], tokens=1)
            for number, (name, fields) in enumerate(asks.items()):
                each = [
                    one(running, tower, name, fields, seed=number * rounds + again)
                    for again in range(rounds)
                ]
                rows.append(sorted(each, key=lambda row: row.seconds)[(len(each) - 1) // 2])
                say(str(rows[-1]))
    return rows


def one(running: Server, tower: str, name: str, fields: dict[str, Any], seed: int) -> Row:
    """Ask about one new picture while the other clients go on."""
    url = large_picture(seed)
    forget_peaks(running)
    with others(running) as waits:
        time.sleep(1.0)
        reply = ask(running.url, MODEL_NAME, [user(QUESTION, url)], tokens=1, **fields)
    return Row(tower, name, reply.seconds, max(waits), peak(running))


@contextmanager
def others(running: Server) -> Iterator[list[float]]:
    """Have other clients ask about small pictures during the block; collect their seconds."""
    waits: list[float] = []
    is_over = threading.Event()

    def go_on(client: int) -> None:
        url = data_url(photo("cat").resize((112, 84 + 28 * client)))
        while not is_over.is_set():
            waits.append(ask(running.url, MODEL_NAME, [user("a cat?", url)], tokens=1).seconds)
            time.sleep(0.25)

    threads = [threading.Thread(target=go_on, args=(client,)) for client in range(OTHERS)]
    for thread in threads:
        thread.start()
    try:
        yield waits
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def large_picture(seed: int) -> str:
    """Return a photograph with a mark of its own, so that no cache knows it, as a URL."""
    image = photo("astronaut").resize((SIDE, SIDE))
    ImageDraw.Draw(image).rectangle((seed * 40, 0, seed * 40 + 39, 39), fill=(seed * 9 % 256, 0, 0))
    return data_url(image, format="JPEG")


def processes(running: Server) -> list[Path]:
    """List the folders in ``/proc`` of a server's processes: they share its session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == running.process_id:
                    found.append(folder)
            except (ProcessLookupError, PermissionError):
                continue
    return found


def forget_peaks(running: Server) -> None:
    """Reset the kernel's record of peak memory."""
    for folder in processes(running):
        (folder / "clear_refs").write_text("5")


def peak(running: Server) -> float:
    """Return the largest peak of any of its processes, in MiB."""
    peaks = []
    for folder in processes(running):
        lines = (folder / "status").read_text().splitlines()
        peaks += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return max(peaks)


def stock_of(rows: list[Row], tower: str) -> Row:
    """Return the row of the server without the plugin."""
    return next(row for row in rows if row.tower == tower and row.name == "stock")


def marks(rows: list[Row]) -> list[Mark]:
    """Judge the selector that takes longest, and the one that needs most memory."""
    found = []
    for tower in {row.tower: None for row in rows}:
        stock = stock_of(rows, tower)
        ours = [row for row in rows if row.tower == tower and row.name in BUILT_IN]
        slowest = max(ours, key=lambda row: row.seconds)
        times = slowest.seconds / stock.seconds
        found.append(
            Mark(
                f"{tower}: with any selector at most {MOST_TIMES[tower]} of stock's time",
                f"{times:.2f} ({slowest.name}: {slowest.seconds:.1f} s; {stock.seconds:.1f} s)",
                times <= MOST_TIMES[tower],
            )
        )
        largest = max(ours, key=lambda row: row.peak)
        more = largest.peak - stock.peak
        found.append(
            Mark(
                f"{tower}: memory at most stock's plus {MOST_MEMORY} MiB",
                f"{more:+.0f} MiB ({largest.name}: {largest.peak:.0f} MiB)",
                more <= MOST_MEMORY,
            )
        )
        waits = max(ours, key=lambda row: row.others)
        found.append(
            Mark(
                f"{tower}: other clients wait at most 1.2 of what they wait beside stock",
                f"{waits.others / stock.others:.2f} ({waits.name}: {waits.others:.1f} s)",
                waits.others <= 1.2 * stock.others,
            )
        )
    return found


def rows_table(rows: list[Row], tower: str) -> str:
    """Draw one tower's rows."""
    stock = stock_of(rows, tower)
    cells = [
        (
            row.name,
            f"{row.seconds:.1f}",
            f"{row.seconds / stock.seconds:.2f}",
            f"{row.others:.1f}",
            f"{row.peak:.0f}",
        )
        for row in rows
        if row.tower == tower
    ]
    heads = ("request", "seconds", "of stock's", "slowest of others, s", "peak memory, MiB")
    return f"**Tower of {tower}**\n\n" + table(heads, cells)


if __name__ == "__main__":
    sys.exit(main())
