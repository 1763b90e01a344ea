# SPDX-License-Identifier: Apache-2.0
"""Cost of further questions about one image.

Four servers of one model, whose vision tower takes most of the time, take turns: stock, and the
plugin without and with its feature cache, the latter also with pictures that follow the words of
their own message. Run from the repository root:
``python -m benchmarks.multiturn.run --check``.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.ask import ask, user
from benchmarks.measuring.bench import PAUSE_SECONDS
from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.drawing import blank
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.metrics import MetricsError, page, value
from benchmarks.measuring.order import rotated
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, marks_table, say
from benchmarks.measuring.servers import MODEL_NAME, server, start
from benchmarks.multiturn.figures import (
    CACHED,
    COLUMNS,
    MODES,
    OFF,
    OWN,
    STOCK,
    TITLES,
    Mode,
    Series,
    marks,
    mode_table,
)
from testing.photo import data_url
from testing.tiny.llava import build_llava

SCRATCH: Final = scratch("multiturn")
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
ARGUMENTS: Final = ("--max-model-len", "4096")  # room for five whole images
CACHE_FLAG: Final = "--visual-feature-cache-gb"
CACHE: Final = {
    STOCK: (),
    OFF: (CACHE_FLAG, "0"),
    CACHED: (CACHE_FLAG, "1"),
    OWN: (CACHE_FLAG, "1", "--visual-steering", "own"),
}


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
    """Send all questions about one image and count the images encoded for the later ones."""
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
    """Return how many images with a budget were encoded; None: the server does not count them."""
    try:
        return int(value(page(url), MISSES))
    except MetricsError:
        return None


def encoded_since(url: str, before: int) -> int | None:
    """Return how many were encoded since then."""
    now = encoded(url)
    return None if now is None else now - before


Found = dict[Mode, dict[str, list[Series]]]


def measure(plan: Plan, columns: Sequence[str]) -> Found:
    """Start the servers and send the questions; each mode has its own images."""
    model = build_llava(
        MODELS / f"multiturn-llava-{plan.vision_hidden}x{plan.vision_layers}",
        hidden=plan.hidden,
        layers=plan.layers,
        vision_hidden=plan.vision_hidden,
        vision_layers=plan.vision_layers,
    )
    found: Found = {mode: {column: [] for column in columns} for mode in MODES}
    with ExitStack() as stack:
        urls = {}
        for column in columns:
            plugin = column != STOCK
            log = SCRATCH / f"{COLUMNS.index(column)}.log"
            arguments = (*ARGUMENTS, *CACHE[column])
            described = server(model, plugin=plugin, log=log, arguments=arguments)
            urls[column] = start(stack, column, described, plugin=plugin).url
        for column, url in urls.items():  # warm-up, with an image that is not measured
            for mode in MODES:
                question_series(url, column, mode, number=0)
        number = 0
        for round_ in range(plan.images):
            for mode in MODES:
                number += 1
                for column in rotated(columns, round_):
                    time.sleep(PAUSE_SECONDS)
                    one = question_series(urls[column], column, mode, number)
                    found[mode][column].append(one)
                    shown = ", ".join(f"{1000 * ttft:.0f}" for ttft in one.ttfts)
                    say(f"image {round_ + 1}/{plan.images}, {mode}, {column}: TTFT {shown} ms")
    return found


def report(found: Mapping[Mode, Mapping[str, Sequence[Series]]]) -> str:
    """Return the tables as Markdown."""
    parts = [f"**{TITLES[mode]}**\n\n{mode_table(columns)}" for mode, columns in found.items()]
    return "\n\n".join([*parts, marks_table(marks(found))])


def plot(found: Mapping[Mode, Mapping[str, Sequence[Series]]], file: Path) -> None:
    """Draw the median TTFT of every question."""
    figure = blank(10, 4)
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
    """Measure; write results, tables and plot."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small tower, few images")
    parser.add_argument("--images", type=int, help="images per mode")
    parser.add_argument("--servers", nargs="+", choices=COLUMNS, default=COLUMNS)
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    plan = dataclasses.replace(plan, images=asked.images or plan.images)
    folder = asked.output or (SCRATCH if asked.quick else committed("multiturn"))

    stop_servers_on_sigterm()
    settings = {**machine(), "plan": dataclasses.asdict(plan), "budget": BUDGET}
    found = measure(plan, asked.servers)
    series = {
        mode: {
            column: [dataclasses.asdict(one) for one in all_] for column, all_ in columns.items()
        }
        for mode, columns in found.items()
    }
    figures = {"series": series}
    status = publish(folder, settings, figures, marks(found), report(found), check=asked.check)
    plot(found, folder / "plot.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
