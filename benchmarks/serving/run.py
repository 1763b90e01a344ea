# SPDX-License-Identifier: Apache-2.0
"""How much traffic does a server carry with budgets, against stock vLLM?

Two servers of one model are up at once, stock and with the plugin; every round gives each column
(stock; the plugin without a budget, and with 128, 64 and 32 tokens) one turn of ``vllm bench
serve``. Run from the repository root: ``python -m benchmarks.serving.run --check``.
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B
from benchmarks.efficiency.shapes import ON_GPU, write_shape
from benchmarks.measuring.bench import as_turn, bench, images_of, random_images, random_text
from benchmarks.measuring.metrics import (
    PREEMPTIONS,
    PROMPT_TOKENS,
    REQUESTS,
    Peak,
    kv_blocks,
    page,
    value,
)
from benchmarks.measuring.report import Mark, machine, marks_table, missed, say, write
from benchmarks.measuring.servers import confirm, server
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

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
SCRATCH: Final = ROOT / "benchmarks" / "output" / "serving"
ARGUMENTS: Final = (
    "--block-size", "32",  # The finest for vLLM's attention on CPUs; its default there is 128.
    "--max-num-seqs", "128",  # So that memory, not this, limits how many run at once.
    "--max-model-len", "2048",
)  # fmt: skip
# On a GPU both servers share it, and hold LLaVA-1.5-7B's shape.
GPU_ARGUMENTS: Final = (
    *ON_GPU, "--gpu-memory-utilization", "0.4", "--max-num-seqs", "128", "--max-model-len", "2048",
)  # fmt: skip
RESIDENT_TOKENS: Final = 48  # Long answers: the first is still there when the last one comes.
NOT_TIMED: Final = 900_000  # seeds of turns that nothing is timed in


class Side:
    """One of the two servers, with what its counters said last."""

    def __init__(self, running: Server) -> None:
        self.url = running.url
        self._before = page(running.url)

    def counted(self) -> tuple[float, int]:
        """Prompt tokens per request and preemptions since asked before."""
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
        """Whose turn it is."""
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
        """Let both servers see what is coming, at each budget."""
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
        """Look how many requests run at once when there are more clients than fit."""
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
    """Make the model, and say how it is served.

    Speed does not depend on what weights say, so a GPU gets the true shape and random weights.
    """
    models = ROOT / ".models"
    if on_gpu:
        path = write_shape(
            models / "serving-llava-7b-shape",
            LLAMA_7B,
            CLIP_L,
            head=128,
            vision_head=64,
            next=False,
        )
        return path, GPU_ARGUMENTS
    path = build_llava(
        models / f"serving-llava-{plan.hidden}x{plan.layers}",
        hidden=plan.hidden,
        layers=plan.layers,
    )
    return path, ARGUMENTS


def measure(plan: Plan) -> tuple[list[Measured], dict[str, Residency]]:
    """Start both servers and measure everything."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    model, options = checkpoint(plan, on_gpu=torch.cuda.is_available())
    with ExitStack() as stack:
        sides = {}
        for plugin in (False, True):
            name = "plugin" if plugin else "stock"
            say(f"starting: {name}")
            running = stack.enter_context(
                server(model, plugin=plugin, log=SCRATCH / f"{name}.log", arguments=options)
            )
            confirm(running.url, plugin=plugin)
            sides[plugin] = Side(running)
        turns = Bench(model, sides)
        say("warming up")
        turns.warm_up()
        levels = [turns.level(index, level) for index, level in enumerate(plan.levels)]
        return levels, turns.residency(levels[0].prompt_tokens, plan.most_clients)


def report(
    levels: Sequence[Measured], residency: Mapping[str, Residency], judged: Sequence[Mark]
) -> str:
    """Write everything that a reader wants to see as Markdown."""
    parts = [f"**{one.level.name}**\n\n{level_table(one)}" for one in levels]
    parts.append(f"**KV cache**\n\n{residency_table(residency)}")
    parts.append(f"Prefill's part of stock's time:\n\n{prefill_lines(levels)}")
    parts.append(marks_table(judged))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write the JSON file, the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small model, few turns")
    parser.add_argument("--hidden", type=int, help="width of the language model")
    parser.add_argument("--layers", type=int, help="its layers")
    parser.add_argument("--rounds", type=int, help="turns per column and load")
    parser.add_argument("--output", type=Path, help="folder for results.json, tables.md, plot.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a mark is missed")
    asked = parser.parse_args(arguments)

    plan = QUICK if asked.quick else FULL
    if asked.rounds:
        loads = tuple(dataclasses.replace(one, rounds=asked.rounds) for one in plan.levels)
        plan = dataclasses.replace(plan, levels=loads)
    plan = dataclasses.replace(
        plan, hidden=asked.hidden or plan.hidden, layers=asked.layers or plan.layers
    )
    folder = asked.output or (SCRATCH if asked.quick else HERE)

    # Ended from outside, it still stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings: dict[str, Any] = {**machine(), "plan": dataclasses.asdict(plan)}
    levels, residency = measure(plan)
    found = marks(levels, on_gpu=torch.cuda.is_available())
    text = report(levels, residency, found)
    print(text)
    figures = {
        "levels": {one.level.name: one.as_json() for one in levels},
        "residency": {column: dataclasses.asdict(one) for column, one in residency.items()},
    }
    write(folder / "results.json", settings, figures, found)
    (folder / "tables.md").write_text(text)
    plot(levels, residency, folder / "plot.png")
    return 1 if missed(found) and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
