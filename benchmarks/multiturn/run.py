# SPDX-License-Identifier: Apache-2.0
"""What does another question about the same image cost?

Three servers of one model whose vision tower is most of the work take turns: stock, and the plugin
without and with its cache of image features. Run from the repository root:
``python -m benchmarks.multiturn.run --check``.
"""

import argparse
import dataclasses
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.bench import PAUSE_SECONDS
from benchmarks.measuring.metrics import MetricsError, page, value
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, marks_table, missed, say, write
from benchmarks.measuring.servers import MODEL_NAME, confirm, server
from benchmarks.multiturn.figures import (
    CACHED,
    COLUMNS,
    MODES,
    OFF,
    STOCK,
    TITLES,
    Mode,
    Series,
    marks,
    mode_table,
)
from testing.photo import data_url
from testing.tiny.llava import build_llava

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
SCRATCH: Final = ROOT / "benchmarks" / "output" / "multiturn"
BUDGET: Final = 64
ANSWER_TOKENS: Final = 16
MISSES: Final = "flashvlm_feature_cache_misses"
QUESTIONS: Final = (
    "What is in this picture?",
    "Which colour is the object in the middle?",
    "What is on the left, and what is behind it?",
    "How many things stand in front, and what are they made of?",
    "Describe the image in one short sentence.",
)
ARGUMENTS: Final = ("--max-model-len", "4096")  # five whole images, if it comes to that
CACHE_FLAG: Final = "--visual-feature-cache-gb"
CACHE: Final = {STOCK: (), OFF: (CACHE_FLAG, "0"), CACHED: (CACHE_FLAG, "1")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run; the tower and the language model, as ``build_llava`` takes them."""

    vision_hidden: int
    vision_layers: int
    hidden: int
    layers: int
    images: int


# The tower is as wide and deep as CLIP-L, with half its MLP and heads of 32.
FULL: Final = Plan(vision_hidden=1024, vision_layers=24, hidden=256, layers=4, images=12)
QUICK: Final = Plan(vision_hidden=512, vision_layers=8, hidden=128, layers=2, images=2)


def question_series(url: str, column: str, mode: Mode, number: int) -> Series:
    """Ask everything about one image and count what was encoded for later questions."""
    image = data_url(picture(number))
    fields: dict[str, Any] = {} if column == STOCK else {"visual_budget": BUDGET}
    messages: list[dict[str, Any]] = []
    replies = []
    before = None
    for index, question in enumerate(QUESTIONS):
        if mode == "independent" or not messages:
            messages = [user(question, image)]
        else:
            messages.append(user(question))
        reply = ask(url, MODEL_NAME, messages, ANSWER_TOKENS, **fields)
        messages.append({"role": "assistant", "content": reply.text})
        replies.append(reply)
        if column != STOCK and index == 0:
            before = encoded(url)
    behind = None if before is None else encoded_since(url, before)
    return Series(
        tuple(reply.ttft for reply in replies),
        behind,
        tuple(reply.prompt_tokens for reply in replies),
    )


def encoded(url: str) -> int | None:
    """Images with a budget that went through the tower; None: the server does not count them."""
    try:
        return int(value(page(url), MISSES))
    except MetricsError:
        return None


def encoded_since(url: str, before: int) -> int | None:
    """Those that came since."""
    now = encoded(url)
    return None if now is None else now - before


def turn_order(columns: Sequence[str], round_: int) -> list[str]:
    """Say who follows whom: each is in each place equally often over as many rounds as columns."""
    place = round_ % len(columns)
    return [*columns[place:], *columns[:place]]


Found = dict[Mode, dict[str, list[Series]]]


def measure(plan: Plan, columns: Sequence[str]) -> Found:
    """Start the servers and ask; every mode has images of its own."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    model = build_llava(
        ROOT / ".models" / f"multiturn-llava-{plan.vision_hidden}x{plan.vision_layers}",
        hidden=plan.hidden,
        layers=plan.layers,
        vision_hidden=plan.vision_hidden,
        vision_layers=plan.vision_layers,
    )
    found: Found = {mode: {column: [] for column in columns} for mode in MODES}
    with ExitStack() as stack:
        urls = {}
        for column in columns:
            say(f"starting: {column}")
            running = stack.enter_context(
                server(
                    model,
                    plugin=column != STOCK,
                    log=SCRATCH / f"{COLUMNS.index(column)}.log",
                    arguments=(*ARGUMENTS, *CACHE[column]),
                )
            )
            confirm(running.url, plugin=column != STOCK)
            urls[column] = running.url
        for column, url in urls.items():  # warms up, at an image that is not measured
            for mode in MODES:
                question_series(url, column, mode, number=0)
        number = 0
        for round_ in range(plan.images):
            for mode in MODES:
                number += 1
                for column in turn_order(columns, round_):
                    time.sleep(PAUSE_SECONDS)
                    one = question_series(urls[column], column, mode, number)
                    found[mode][column].append(one)
                    shown = ", ".join(f"{1000 * ttft:.0f}" for ttft in one.ttfts)
                    say(f"image {round_ + 1}/{plan.images}, {mode}, {column}: TTFT {shown} ms")
    return found


def report(found: Mapping[Mode, Mapping[str, Sequence[Series]]]) -> str:
    """Write everything that a reader wants to see as Markdown."""
    parts = [f"**{TITLES[mode]}**\n\n{mode_table(columns)}" for mode, columns in found.items()]
    return "\n\n".join([*parts, marks_table(marks(found))]) + "\n"


def plot(found: Mapping[Mode, Mapping[str, Sequence[Series]]], file: Path) -> None:
    """Draw the median TTFT of every question."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (mode, columns) in zip(
        figure.subplots(1, 2, sharey=True), found.items(), strict=True
    ):
        for column, series in columns.items():
            turns = zip(*(one.ttfts for one in series), strict=True)
            medians = [statistics.median(turn) for turn in turns]
            axes.plot(range(1, 1 + len(medians)), medians, marker="o", label=column)
        axes.set_title(TITLES[mode], fontsize=10)
        axes.set_xlabel("question")
        axes.set_xticks(range(1, 1 + len(QUESTIONS)))
        axes.set_yscale("log")
        axes.legend(frameon=False)
    figure.supylabel("TTFT p50, s (log)")
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write the JSON file, the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small tower, few images")
    parser.add_argument("--images", type=int, help="images per way of asking")
    parser.add_argument("--servers", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--output", type=Path, help="folder for results.json, tables.md, plot.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a mark is missed")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    plan = dataclasses.replace(plan, images=asked.images or plan.images)
    folder = asked.output or (SCRATCH if asked.quick else HERE)

    # Ended from outside, it still stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = {**machine(), "plan": dataclasses.asdict(plan), "budget": BUDGET}
    found = measure(plan, asked.servers)
    text = report(found)
    print(text)
    series = {
        mode: {
            column: [dataclasses.asdict(one) for one in all_] for column, all_ in columns.items()
        }
        for mode, columns in found.items()
    }
    write(folder / "results.json", settings, {"series": series}, marks(found))
    (folder / "tables.md").write_text(text)
    plot(found, folder / "plot.png")
    return 1 if missed(marks(found)) and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
