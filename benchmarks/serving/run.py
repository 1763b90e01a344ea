# SPDX-License-Identifier: Apache-2.0
"""Throughput of a server with budgets, compared with stock vLLM.

Two servers of one model run at the same time, stock and with the plugin; every round gives each
column (stock; the plugin without a budget, and with 128, 64 and 32 tokens) one turn of ``vllm bench
serve``. Run from the repository root: ``python -m benchmarks.serving.run --check``.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B
from benchmarks.efficiency.shapes import ON_GPU, write_shape
from benchmarks.measuring.bench import as_turn, bench, images_of, random_images, random_text
from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.metrics import (
    PREEMPTIONS,
    PROMPT_TOKENS,
    REQUESTS,
    Peak,
    kv_blocks,
    page,
    value,
)
from benchmarks.measuring.report import Mark, machine, marks_table, say
from benchmarks.measuring.servers import stock_and_plugin
from benchmarks.measuring.turn import Turn
from benchmarks.serving.figures import (
    Measured,
    Residency,
    level_table,
    marks,
    prefill_lines,
    residency_table,
)
from benchmarks.serving.photos import write_photos
from benchmarks.serving.plan import (
    COLUMNS,
    FULL,
    OUTPUT_TOKENS,
    QUICK,
    TEXT,
    TEXT_TOKENS,
    Level,
    Plan,
    budget_of,
    order,
    seed,
    uses_plugin,
)
from benchmarks.serving.plot import plot
from testing.server import Server
from testing.tiny.llava import VISUAL_TOKENS, build_llava

SCRATCH: Final = scratch("serving")
ARGUMENTS: Final = (
    "--block-size", "32",  # The smallest of vLLM's attention on CPUs; its default there is 128.
    "--max-num-seqs", "128",  # So that memory, not this, limits how many run at once.
    "--max-model-len", "2048",
)  # fmt: skip
# On a GPU both servers share it, and hold LLaVA-1.5-7B's shape.
GPU_ARGUMENTS: Final = (
    *ON_GPU, "--gpu-memory-utilization", "0.4", "--max-num-seqs", "128", "--max-model-len", "2048",
)  # fmt: skip
RESIDENT_TOKENS: Final = 48
"""Long outputs, so that the first request still runs when the last one arrives."""
NOT_TIMED: Final = 900_000  # seeds of turns that are not timed


class Side:
    """One of the two servers, with the last values of its counters."""

    def __init__(self, running: Server) -> None:
        self.url = running.url
        self._before = page(running.url)

    def counted(self) -> tuple[float, int]:
        """Return prompt tokens per request, and preemptions, since the last call."""
        now, before = page(self.url), self._before
        self._before = now

        def since(name: str) -> float:
            return value(now, name) - value(before, name)

        return since(PROMPT_TOKENS) / max(1, since(REQUESTS)), int(since(PREEMPTIONS))


class Bench:
    """Takes turns on the two servers."""

    def __init__(self, model: Path, sides: Mapping[bool, Side]) -> None:
        self._model = model
        self._sides = sides

    def side(self, column: str) -> Side:
        """Return the server of a column."""
        return self._sides[uses_plugin(column)]

    def turn(
        self, traffic: str, column: str, *, tokens: int, prompts: int, clients: int, number: int
    ) -> Turn:
        """Take one turn; ``number`` is its seed."""
        sent = random_images(TEXT_TOKENS, tokens)
        if column == TEXT:
            tokens = 1
            sent = random_text(TEXT_TOKENS + VISUAL_TOKENS, tokens)
        elif traffic == "photos":
            sent = images_of(write_photos(SCRATCH / "photos.jsonl", prompts, number), tokens)
        figures = bench(
            self.side(column).url,
            self._model,
            sent,
            output_tokens=tokens,
            prompts=prompts,
            clients=clients,
            seed=number,
            log=SCRATCH / "bench.log",
            budget=budget_of(column),
        )
        return as_turn(figures, tokens)

    def warm_up(self) -> None:
        """Send some requests at each budget."""
        for place, column in enumerate(COLUMNS):
            self.turn(
                "random", column, tokens=OUTPUT_TOKENS, prompts=4, clients=4,
                number=NOT_TIMED + place,
            )  # fmt: skip

    def level(self, index: int, level: Level) -> Measured:
        """Measure all rounds of a level."""
        found = Measured(level, {column: [] for column in level.columns})
        tokens: dict[str, list[float]] = {column: [] for column in level.columns}
        found.preemptions.update(dict.fromkeys(level.columns, 0))
        for side in self._sides.values():
            side.counted()
        for round_ in range(level.rounds):
            for column in order(level.columns, round_):
                turn = self.turn(
                    level.traffic,
                    column,
                    tokens=OUTPUT_TOKENS,
                    prompts=level.prompts,
                    clients=level.clients,
                    number=seed(index, round_, column),
                )
                found.turns[column].append(turn)
                prompt_tokens, preemptions = self.side(column).counted()
                tokens[column].append(prompt_tokens)
                found.preemptions[column] += preemptions
                say(
                    f"{level.name}, round {round_ + 1}/{level.rounds}, {column}: "
                    f"{turn.requests_per_second:.2f} requests/s"
                )
        found.prompt_tokens = {column: sum(all_) / len(all_) for column, all_ in tokens.items()}
        return found

    def residency(self, tokens: Mapping[str, float], most: int) -> dict[str, Residency]:
        """Count the requests that run at once when there are more clients than fit."""
        found = {}
        for place, column in enumerate(COLUMNS):
            url = self.side(column).url
            blocks, size = kv_blocks(page(url))
            one = Residency(blocks, size, tokens[column], clients=0, seen=0)
            clients = min(most, one.computed + 4)
            with Peak(url) as peak:
                self.turn(
                    "random", column, tokens=RESIDENT_TOKENS, prompts=clients, clients=clients,
                    number=NOT_TIMED + 100 + place,
                )  # fmt: skip
            found[column] = dataclasses.replace(one, clients=clients, seen=peak.running)
            say(f"resident, {column}: {peak.running} of {clients}")
        return found


def checkpoint(plan: Plan, *, on_gpu: bool) -> tuple[Path, tuple[str, ...]]:
    """Write the model and return the arguments of its servers.

    Speed does not depend on the values of weights, so a GPU gets the shape of LLaVA-1.5-7B with
    random weights.
    """
    if on_gpu:
        path = write_shape(
            MODELS / "serving-llava-7b-shape",
            LLAMA_7B,
            CLIP_L,
            head=128,
            vision_head=64,
            next=False,
        )
        return path, GPU_ARGUMENTS
    path = build_llava(
        MODELS / f"serving-llava-{plan.hidden}x{plan.layers}",
        hidden=plan.hidden,
        layers=plan.layers,
    )
    return path, ARGUMENTS


def measure(plan: Plan) -> tuple[list[Measured], dict[str, Residency]]:
    """Start both servers and measure everything."""
    model, options = checkpoint(plan, on_gpu=torch.cuda.is_available())
    with stock_and_plugin(model, SCRATCH, options) as running:
        turns = Bench(model, {plugin: Side(each) for plugin, each in running.items()})
        say("warming up")
        turns.warm_up()
        levels = [turns.level(index, level) for index, level in enumerate(plan.levels)]
        return levels, turns.residency(levels[0].prompt_tokens, plan.most_clients)


def report(
    levels: Sequence[Measured], residency: Mapping[str, Residency], judged: Sequence[Mark]
) -> str:
    """Return the tables as Markdown."""
    parts = [f"**{one.level.name}**\n\n{level_table(one)}" for one in levels]
    parts.append(f"**KV cache**\n\n{residency_table(residency)}")
    parts.append(f"Prefill's part of stock's time:\n\n{prefill_lines(levels)}")
    parts.append(marks_table(judged))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write results, tables and plot."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small model, few turns")
    parser.add_argument("--hidden", type=int, help="width of the language model")
    parser.add_argument("--layers", type=int, help="its layers")
    parser.add_argument("--rounds", type=int, help="turns per column and load")
    asked = parser.parse_args(arguments)

    plan = QUICK if asked.quick else FULL
    if asked.rounds:
        loads = tuple(dataclasses.replace(one, rounds=asked.rounds) for one in plan.levels)
        plan = dataclasses.replace(plan, levels=loads)
    plan = dataclasses.replace(
        plan, hidden=asked.hidden or plan.hidden, layers=asked.layers or plan.layers
    )
    folder = asked.output or (SCRATCH if asked.quick else committed("serving"))

    stop_servers_on_sigterm()
    settings: dict[str, Any] = {**machine(), "plan": dataclasses.asdict(plan)}
    levels, residency = measure(plan)
    found = marks(levels, on_gpu=torch.cuda.is_available())
    figures = {
        "levels": {one.level.name: one.as_json() for one in levels},
        "residency": {column: dataclasses.asdict(one) for column, one in residency.items()},
    }
    text = report(levels, residency, found)
    status = publish(folder, settings, figures, found, text, check=asked.check)
    plot(levels, residency, folder / "plot.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
