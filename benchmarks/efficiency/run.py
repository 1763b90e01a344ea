# SPDX-License-Identifier: Apache-2.0
"""The paper's efficiency table: formulas for the 7B, latencies of what this machine can run.

On a CPU a scaled LLaVA-NeXT is measured; where there is a GPU, the 7B's shape with random weights
instead. Run from the repository root: ``python -m benchmarks.efficiency.run --check``.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.report import machine, marks_table, missed, say, write
from benchmarks.measuring.servers import confirm, server

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
MODELS: Final = ROOT / ".models"
SCRATCH: Final = ROOT / "benchmarks" / "output" / "efficiency"
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
    """Time every way once a round, each with a picture of its own, forwards and backwards."""
    found: dict[Way, list[float]] = {way: [] for way in WAYS}
    tokens: dict[Way, int] = {}
    with ExitStack() as stack:
        urls = {}
        for plugin in (False, True):
            say(f"{model.name}, starting: {'plugin' if plugin else 'stock'}")
            running = stack.enter_context(
                server(
                    model.path,
                    plugin=plugin,
                    log=SCRATCH / f"{model.device}-{'plugin' if plugin else 'stock'}.log",
                    arguments=model.arguments,
                )
            )
            confirm(running.url, plugin=plugin)
            urls[plugin] = running.url
        served = Served(urls[False], urls[True], AutoTokenizer.from_pretrained(model.path))
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
    """Say who follows whom, and about which picture: no cache knows it from another turn."""
    for round_ in range(rounds):
        for place, way in enumerate(WAYS if round_ % 2 == 0 else WAYS[::-1]):
            yield way, 1 + round_ * len(WAYS) + place


def report(found: Latencies, name: str, *, on_gpu: bool) -> str:
    """Write everything that a reader wants to see as Markdown."""
    return "\n\n".join(
        [
            "**LLaVA-NeXT-7B: the formulas beside the paper**",
            formula_table(found if on_gpu else None),
            f"**Measured on this machine's {'GPU' if on_gpu else 'CPU'}: {name}**",
            latency_table(found),
            marks_table(marks(found)) + "\n",
        ]
    )


def plot(found: Latencies, name: str, file: Path) -> None:
    """Draw what is left of the unpruned latency, ours and the paper's."""
    pruned = [way for way in found.rounds if way.budget is not None]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
    """Measure; write the JSON file, the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small model, few rounds")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    parser.add_argument("--output", type=Path, help="folder for results.json, tables.md, plot.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a mark is missed")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    plan = dataclasses.replace(plan, rounds=asked.rounds or plan.rounds)
    folder = asked.output or (SCRATCH if asked.quick else HERE)

    # Ended from outside, it still stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    SCRATCH.mkdir(parents=True, exist_ok=True)
    settings = {**machine(), "plan": dataclasses.asdict(plan)}
    on_gpu = torch.cuda.is_available()
    model = (
        true_7b(MODELS)
        if on_gpu
        else scaled(MODELS, plan.hidden, plan.layers, plan.vision_hidden, plan.vision_layers)
    )
    found = measure(model, plan.rounds)
    text = report(found, model.name, on_gpu=on_gpu)
    print(text)
    figures = {"model": model.name, **as_json(found)}
    write(folder / "results.json", settings, figures, marks(found))
    (folder / "tables.md").write_text(text)
    plot(found, model.name, folder / "plot.png")
    return 1 if missed(marks(found)) and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
