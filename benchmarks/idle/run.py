# SPDX-License-Identifier: Apache-2.0
"""Cost of the plugin for requests without a budget.

Four servers of one small model run at the same time: two without the plugin, one where it is
installed but not named, one where it is named but no request has a budget. In every round each has
one turn of ``vllm bench serve``. The servers are started several times, because two processes of
the same server can differ by 13 % in nearly all rounds; ``figures.py`` compares the starts. Run
from the repository root: ``python -m benchmarks.idle.run --check``.

Turns are short, because other work on a machine starts and ends within seconds and is the same for
all servers only within a short round.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.idle.figures import (
    FIGURES,
    STOCK,
    STOCK_AGAIN,
    Turns,
    marks,
    medians,
    ratios,
    report,
)
from benchmarks.measuring.bench import bench, random_images
from benchmarks.measuring.command import command_line, publish, stop_servers_on_sigterm
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import rotated
from benchmarks.measuring.pairs import FEWEST_ROUNDS
from benchmarks.measuring.report import machine, say
from benchmarks.measuring.servers import MODEL_NAME, NO_PLUGINS, PLUGIN, QUIET, is_enabled
from testing.server import Server
from testing.tiny.llava import build_llava

SCRATCH: Final = scratch("idle")
NOT_NAMED: Final = "flashvlm is installed but not enabled"  # logged by the disabled plugin

INPUT_TOKENS: Final = 32  # besides the 576 of the image
OUTPUT_TOKENS: Final = 16


@dataclass(frozen=True)
class Setup:
    """Arguments and environment of a server."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


SETUPS: Final = {
    STOCK: Setup(environment=NO_PLUGINS),
    "disabled": Setup(),
    "idle": Setup(arguments=PLUGIN),
    STOCK_AGAIN: Setup(environment=NO_PLUGINS),
}


PLACES: Final = (0, 1, 3, 2)


def order(index: int) -> list[str]:
    """Return the order of the servers in a round.

    Over four rounds each server is in each place once, and once directly after each other one, so
    that what a turn leaves in the machine's caches affects all of them alike.
    """
    names = rotated(list(SETUPS), index)
    return [names[place] for place in PLACES]


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
    """Stop the benchmark unless a server is in the state that its name says."""
    state = (is_enabled(server.url), NOT_NAMED in server.log)
    expected = (name == "idle", name == "disabled")
    if state != expected:
        raise RuntimeError(f"the {name} server: (plugin enabled, loaded but not named) is {state}")


def measure(start: int, rounds: int, prompts: int, concurrency: int) -> Turns:
    """Start all servers and measure them in turn, after a warm-up round."""
    model = build_llava(MODELS / "idle-llava", hidden=512, layers=8)
    turns: Turns = {name: [] for name in SETUPS}
    with ExitStack() as stack:
        servers = {}
        for name in rotated(list(SETUPS), start):
            setup = SETUPS[name]
            say(f"start {start + 1}: {name}")
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
        for index in range(start * rounds, (start + 1) * rounds):
            for name in order(index):
                # New requests in each round, so that there are no cache hits.
                figures = turn(servers[name].url, model, 1 + index, prompts, concurrency)
                turns[name].append({key: figures[key] for key in ("duration", *FIGURES)})
                shown = ", ".join(f"{label} {figures[key]:.2f}" for key, label in FIGURES.items())
                say(f"round {index + 1}, {name}: {shown}")
    return turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write results and tables."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--starts", type=int, default=9, help=f"of each server, at least {FEWEST_ROUNDS}"
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns per start, best 4 or 8")
    parser.add_argument("--prompts", type=int, default=6, help="requests per turn")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    asked = parser.parse_args(arguments)
    if asked.starts < FEWEST_ROUNDS:
        parser.error(f"--starts must be at least {FEWEST_ROUNDS}: fewer make no 95 % interval")

    stop_servers_on_sigterm()
    settings = {
        **machine(),
        "starts": asked.starts,
        "rounds": asked.rounds,
        "prompts": asked.prompts,
        "concurrency": asked.concurrency,
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
    }
    starts = [
        measure(start, asked.rounds, asked.prompts, asked.concurrency)
        for start in range(asked.starts)
    ]
    runs = medians(starts)
    compared = ratios(runs)
    figures = {"starts": starts, "ratios": [{**asdict(r), "verdict": r.verdict} for r in compared]}
    folder = asked.output or committed("idle")
    return publish(folder, settings, figures, marks(compared), report(runs), check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
