# SPDX-License-Identifier: Apache-2.0
"""Cost of an image of 16,384 visual tokens, and the delay of other requests.

Run from the repository root: ``python -m benchmarks.large_pictures.run --check``. A server without
the plugin and one with it run at the same time. Each row is a pair of requests, one to either
server, with a new image, while eight other clients send that server requests with small images.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from PIL import ImageDraw

from benchmarks.large_pictures.figures import Pair, Request, marks, report
from benchmarks.large_pictures.model import CONTEXT, SIDE, TOKENS, build
from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import alternating
from benchmarks.measuring.report import machine, say
from benchmarks.measuring.servers import MODEL_NAME, server, start
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import data_url, photo
from testing.server import Server

SCRATCH: Final = scratch("large_pictures")
BUDGET: Final = 1024
TOWERS: Final = {
    "two layers": (2, [1]),
    "32 layers": (32, [7, 15, 23, 31]),
}
OTHERS: Final = 8
"""Clients that send requests with small images."""
WARM_UP: Final = 89
QUESTION: Final = "what color is the suit?"


def main() -> int:
    """Measure; write results and tables."""
    parser = command_line(__doc__)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--selectors", nargs="+", choices=BUILT_IN, default=list(BUILT_IN))
    parser.add_argument("--rounds", type=int, default=1, help="pairs per row; the median counts")
    asked = parser.parse_args()
    stop_servers_on_sigterm()
    about = machine()
    pairs: list[Pair] = []
    for tower in asked.towers:
        pairs += measure(tower, asked.selectors, asked.rounds)
    settings = {"machine": about, "tokens": TOKENS, "budget": BUDGET, "rounds": asked.rounds}
    figures = {"pairs": [asdict(pair) for pair in pairs]}
    folder = asked.output or committed("large_pictures")
    return publish(folder, settings, figures, marks(pairs), report(pairs), check=asked.check)


def measure(tower: str, selectors: Sequence[str], rounds: int) -> list[Pair]:
    """Measure the plugin without a budget and with each of these selectors, and stock vLLM."""
    model = build(MODELS / f"large-{tower.replace(' ', '-')}", *TOWERS[tower])
    asks: dict[str, dict[str, Any]] = {"no budget": {}}
    asks |= {name: {"visual_budget": BUDGET, "visual_selector": name} for name in selectors}
    found = []
    with ExitStack() as stack:
        running = {}
        for name, plugin in (("stock", False), ("plugin", True)):
            log = SCRATCH / f"{tower.replace(' ', '-')}-{name}.log"
            limits = ("--max-model-len", str(CONTEXT))
            described = server(model, plugin=plugin, log=log, arguments=limits)
            running[name] = start(stack, name, described, plugin=plugin)
            # The first large image allocates memory that the process then keeps.
            url = large_picture(WARM_UP)
            ask(running[name].url, MODEL_NAME, [user(QUESTION, url)], tokens=1)
        for number, (name, fields) in enumerate(asks.items()):
            each = []
            for seed in range(number * rounds, (number + 1) * rounds):
                took = {
                    who: one(running[who], fields if who == "plugin" else {}, seed)
                    for who in alternating(("stock", "plugin"), seed)
                }
                each.append(Pair(tower, name, took["plugin"], took["stock"]))
            found.append(sorted(each, key=lambda pair: pair.times)[(len(each) - 1) // 2])
            say(str(found[-1]))
    return found


def one(running: Server, fields: dict[str, Any], seed: int) -> Request:
    """Send a request with a new image while the other clients run."""
    url = large_picture(seed)
    reset_peaks(running)
    with others(running) as waits:
        # vLLM's processes wait in a busy loop for a second after their last request.
        time.sleep(2.0)
        reply = ask(running.url, MODEL_NAME, [user(QUESTION, url)], tokens=1, **fields)
    return Request(reply.seconds, max(waits), peak(running))


@contextmanager
def others(running: Server) -> Iterator[list[float]]:
    """Run other clients, with small images, during the block; yield the times of their requests."""
    waits: list[float] = []
    is_over = threading.Event()

    def send(client: int) -> None:
        url = data_url(photo("cat").resize((112, 84 + 28 * client)))
        while not is_over.is_set():
            waits.append(ask(running.url, MODEL_NAME, [user("a cat?", url)], tokens=1).seconds)
            time.sleep(0.25)

    threads = [threading.Thread(target=send, args=(client,)) for client in range(OTHERS)]
    for thread in threads:
        thread.start()
    try:
        yield waits
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def large_picture(seed: int) -> str:
    """Return a photograph with a rectangle of its own, so that no cache has it, as a URL."""
    image = photo("astronaut").resize((SIDE, SIDE))
    ImageDraw.Draw(image).rectangle((seed * 40, 0, seed * 40 + 39, 39), fill=(seed * 9 % 256, 0, 0))
    return data_url(image, format="JPEG")


def processes(running: Server) -> list[Path]:
    """Return the folders in ``/proc`` of a server's processes, which share its session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == running.process_id:
                    found.append(folder)
            except (ProcessLookupError, PermissionError):
                continue
    return found


def reset_peaks(running: Server) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
