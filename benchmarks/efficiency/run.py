# SPDX-License-Identifier: Apache-2.0
"""The paper's efficiency table: formulas for the 7B, latencies of what this machine can run.

On a CPU a scaled LLaVA-NeXT is measured; where there is a GPU, the 7B's shape with random weights
instead. Run from the repository root: ``python -m benchmarks.efficiency.run --check``.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from benchmarks.efficiency.figures import (
    OWN_FORWARD,
    VLLM,
    WAYS,
    Latencies,
    Way,
    formula_table,
    latency_table,
    marks,
)
from benchmarks.efficiency.first_token import First, OnTransformers, Served
from benchmarks.efficiency.paper import latency_share
from benchmarks.efficiency.shapes import Model, scaled, true_7b
from benchmarks.measuring.bench import PAUSE_SECONDS
from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.drawing import blank
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import alternating
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, marks_table, say
from benchmarks.measuring.servers import stock_and_plugin

SCRATCH: Final = scratch("efficiency")
SIDE: Final = 672
"""Two by two tiles without a padding to take off: 5 x 576 = 2880 patches, and 48 row newlines."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run on a CPU, the model as ``build_llava`` takes it."""

    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    rounds: int


# The tower's part of the FLOPs is the 7B's, 4 to 5 %.
FULL: Final = Plan(hidden=512, layers=12, vision_hidden=256, vision_layers=4, rounds=10)
QUICK: Final = Plan(hidden=128, layers=3, vision_hidden=64, vision_layers=2, rounds=2)


def measure(model: Model, rounds: int) -> Latencies:
    """Time each configuration once per round, with a new image, in alternating order."""
    found: dict[Way, list[float]] = {way: [] for way in WAYS}
    tokens: dict[Way, int] = {}
    prefix = f"{model.device}-"
    with stock_and_plugin(model.path, SCRATCH, model.arguments, prefix) as running:
        tokenizer = AutoTokenizer.from_pretrained(model.path)
        served = Served(running[False].url, running[True].url, tokenizer)
        alone = OnTransformers(model.on_transformers(), model.path)

        def first(way: Way, number: int) -> First:
            image = picture(number, SIDE)
            time.sleep(PAUSE_SECONDS)
            if way.engine == VLLM:
                return served.first(way, image)
            return alone.first(image, way.budget, own_forward=way.engine == OWN_FORWARD)

        for way, number in turns(rounds=1):
            first(way, -number)  # warms up
        for way, number in turns(rounds):
            one = first(way, number)
            found[way].append(1000 * one.seconds)
            tokens[way] = one.visual_tokens
            say(f"{len(found[way])}/{rounds}, {way.name}: {1000 * one.seconds:.0f} ms")
    return Latencies(model.shape, model.value_bytes, tokens, found)


def turns(rounds: int) -> Iterator[tuple[Way, int]]:
    """Yield each configuration and the number of its image, which no other turn has."""
    for round_ in range(rounds):
        for place, way in enumerate(alternating(WAYS, round_)):
            yield way, 1 + round_ * len(WAYS) + place


def report(found: Latencies, name: str, *, on_gpu: bool) -> str:
    """Return the tables as Markdown."""
    return "\n\n".join(
        [
            "**LLaVA-NeXT-7B: the formulas beside the paper**",
            formula_table(found if on_gpu else None),
            f"**Measured on this machine's {'GPU' if on_gpu else 'CPU'}: {name}**",
            latency_table(found),
            marks_table(marks(found)),
        ]
    )


def plot(found: Latencies, name: str, file: Path) -> None:
    """Draw the latency relative to unpruned, measured and as in the paper."""
    pruned = [way for way in found.rounds if way.budget is not None]
    figure = blank(9, 4)
    axes = figure.subplots()
    at = range(len(pruned))
    measured = [found.share(way).median for way in pruned]
    printed = [latency_share(way.method, way.budget or 0) for way in pruned]
    axes.bar([place - 0.2 for place in at], measured, 0.4, label=f"measured here, {name}")
    axes.bar([place + 0.2 for place in at], printed, 0.4, label="paper, A100, 7B")
    names = [f"{way.method}\n{way.budget}\n({way.engine.split(',')[0]})" for way in pruned]
    axes.set_xticks(at, names)
    axes.set_title("First token: share of the unpruned latency in the same engine")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def as_json(found: Latencies) -> dict[str, Any]:
    """Return everything."""
    return {
        "shape": dataclasses.asdict(found.shape),
        "visual_tokens": {way.name: count for way, count in found.tokens.items()},
        "latency_ms": {way.name: list(times) for way, times in found.rounds.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write results, tables and plot."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small model, few rounds")
    parser.add_argument("--rounds", type=int, help="how often each configuration is timed")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    plan = dataclasses.replace(plan, rounds=asked.rounds or plan.rounds)
    folder = asked.output or (SCRATCH if asked.quick else committed("efficiency"))

    stop_servers_on_sigterm()
    settings = {**machine(), "plan": dataclasses.asdict(plan)}
    on_gpu = torch.cuda.is_available()
    model = (
        true_7b(MODELS)
        if on_gpu
        else scaled(MODELS, plan.hidden, plan.layers, plan.vision_hidden, plan.vision_layers)
    )
    found = measure(model, plan.rounds)
    text = report(found, model.name, on_gpu=on_gpu)
    figures = {"model": model.name, **as_json(found)}
    status = publish(folder, settings, figures, marks(found), text, check=asked.check)
    plot(found, model.name, folder / "plot.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
