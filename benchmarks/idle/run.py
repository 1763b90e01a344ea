# SPDX-License-Identifier: Apache-2.0
"""Does the plugin cost anything where nobody asks for it?

Four servers of one small model are up at once: two without the plugin, one where it is installed
but not named, one where it is named but no request has a budget. In every round each takes one
turn of ``vllm bench serve``; ``ratios.py`` says how the rounds are compared. Run from the
repository root: ``python -m benchmarks.idle.run --check``.

Turns are short and rounds many, because other work on a machine comes and goes within seconds and
is the same for all only within a short round. The command itself takes longer to start than a turn
lasts, so what it runs is called here, with its own parser and its arguments.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import vllm

from benchmarks.idle.ratios import (
    FIGURES,
    STOCK,
    STOCK_AGAIN,
    missed,
    ratios,
    ratios_table,
    servers_table,
)
from benchmarks.measuring.bench import bench, random_images
from benchmarks.measuring.pairs import FEWEST_ROUNDS
from benchmarks.measuring.report import say
from benchmarks.measuring.servers import MODEL_NAME, NO_PLUGINS, QUIET, is_at_work
from testing.server import Server
from testing.tiny.llava import build_llava

ROOT: Final = Path(__file__).resolve().parents[2]
SCRATCH: Final = ROOT / "benchmarks" / "output" / "idle"
NOT_NAMED: Final = "flashvlm is installed but not enabled"  # what the disabled plugin logs

INPUT_TOKENS: Final = 32  # besides the 576 of the image
OUTPUT_TOKENS: Final = 16


@dataclass(frozen=True)
class Setup:
    """How a server is started."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


SETUPS: Final = {
    STOCK: Setup(environment=NO_PLUGINS),
    "disabled": Setup(),
    "idle": Setup(arguments=("--plugins", "flashvlm")),
    STOCK_AGAIN: Setup(environment=NO_PLUGINS),
}


PLACES: Final = (0, 1, 3, 2)


def order(index: int) -> list[str]:
    """Say who follows whom in a round.

    Over four rounds each server is in each place once, and once right after each other one: what
    a turn leaves in the caches of the machine decides nothing.
    """
    names = list(SETUPS)
    return [names[(place + index) % len(names)] for place in PLACES]


def turn(url: str, model: Path, seed: int, prompts: int, concurrency: int) -> dict[str, Any]:
    """Run ``vllm bench serve`` once and return the figures it reports."""
    return bench(
        url,
        model,
        random_images(INPUT_TOKENS, OUTPUT_TOKENS),
        output_tokens=OUTPUT_TOKENS,
        prompts=prompts,
        clients=concurrency,
        seed=seed,
        log=SCRATCH / "bench.log",
    )


def confirm(name: str, server: Server) -> None:
    """Stop the benchmark when a server is not in the state that it is measured for."""
    state = (is_at_work(server.url), NOT_NAMED in server.log)
    expected = (name == "idle", name == "disabled")
    if state != expected:
        raise RuntimeError(f"the {name} server: (plugin at work, loaded unnamed) is {state}")


def measure(rounds: int, prompts: int, concurrency: int) -> dict[str, list[dict[str, Any]]]:
    """Start all servers and measure them in turn, after one round that only warms them up."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    model = build_llava(ROOT / ".models" / "idle-llava", hidden=512, layers=8)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETUPS}
    with ExitStack() as stack:
        servers = {}
        for name, setup in SETUPS.items():
            say(f"starting: {name}")
            server = Server(
                model,
                ["--served-model-name", MODEL_NAME, *setup.arguments],
                log=SCRATCH / f"{name.replace(' ', '-')}.log",
                environment={**QUIET, **setup.environment},
            )
            servers[name] = stack.enter_context(server)
            confirm(name, server)
        for name, server in servers.items():
            say(f"warming up: {name}")
            turn(server.url, model, seed=0, prompts=4, concurrency=concurrency)
        for index in range(rounds):
            for name in order(index):
                # The round's own requests, so that no cache of an earlier round answers.
                figures = turn(servers[name].url, model, 1 + index, prompts, concurrency)
                runs[name].append({key: figures[key] for key in ("duration", *FIGURES)})
                shown = ", ".join(f"{label} {figures[key]:.2f}" for key, label in FIGURES.items())
                say(f"round {index + 1}/{rounds}, {name}: {shown}")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=32, help="turns per server, best a multiple of 4"
    )
    parser.add_argument("--prompts", type=int, default=6, help="requests per turn")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("results.json"), help="JSON file"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 when time per request or mean TTFT is slower than stock by over 2 %%, "
        "the whole 95 %% interval lying above that",
    )
    asked = parser.parse_args(arguments)
    if asked.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}: fewer make no 95 % interval")

    # Ended from outside, it still stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = measure(asked.rounds, asked.prompts, asked.concurrency)
    compared = ratios(runs)
    print(f"{servers_table(runs)}\n\n{ratios_table(compared)}")
    settings = {
        "vllm": vllm.__version__,
        "cores": os.cpu_count(),
        "rounds": asked.rounds,
        "prompts": asked.prompts,
        "concurrency": asked.concurrency,
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    results = [{**asdict(r), "verdict": r.verdict} for r in compared]
    asked.output.write_text(
        json.dumps({**settings, "runs": runs, "ratios": results}, indent=2) + "\n"
    )
    failures = missed(compared)
    for line in failures:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if asked.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
