# SPDX-License-Identifier: Apache-2.0
"""Throughput with positions kept, compared with positions closed.

One server with the plugin; requests with either
take turns. Run from the repository root: ``python -m benchmarks.serving.positions --check``.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer

from benchmarks.efficiency.first_token import WORD
from benchmarks.measuring.bench import PAUSE_SECONDS
from benchmarks.measuring.folders import MODELS, committed, scratch
from benchmarks.measuring.order import alternating
from benchmarks.measuring.pairs import TOLERANCE, Compared, compare
from benchmarks.measuring.report import Mark, machine, marks_table, missed, say, write
from benchmarks.measuring.servers import confirm, server
from benchmarks.measuring.traffic import Pictures, closed_loop
from benchmarks.serving.plan import FULL, OUTPUT_TOKENS, QUICK
from testing.tiny.llava import build_llava

OUTPUT: Final = committed("serving") / "positions.json"
BUDGET: Final = 64
CLIENTS: Final = 8
REQUESTS: Final = 24
"""In a turn."""
ROUNDS: Final = 12
POSITIONS: Final = ("kept", "closed")


def measure(rounds: int, hidden: int, layers: int) -> Compared:
    """Take turns; return requests/s with positions kept over those with positions closed."""
    model = build_llava(MODELS / f"serving-llava-{hidden}x{layers}", hidden=hidden, layers=layers)
    (word,) = AutoTokenizer.from_pretrained(model).encode(WORD, add_special_tokens=False)
    speeds: dict[str, list[float]] = {each: [] for each in POSITIONS}
    pictures = Pictures(336, different=24)
    log = scratch("serving") / "positions.log"
    arguments = ("--block-size", "32", "--max-num-seqs", "128", "--max-model-len", "2048")
    with server(model, plugin=True, log=log, arguments=arguments) as running:
        confirm(running.url, plugin=True)
        for round_ in range(-1, rounds):
            for positions in alternating(POSITIONS, round_):
                fields: dict[str, Any] = {
                    "visual_budget": BUDGET,
                    "visual_positions": positions,
                    "allowed_token_ids": [word],
                }
                images = pictures.take(REQUESTS)
                time.sleep(PAUSE_SECONDS)
                turn, _ = closed_loop(running.url, images, CLIENTS, OUTPUT_TOKENS, fields)
                if round_ >= 0:  # the first round is a warm-up
                    speeds[positions].append(turn.requests_per_second)
                    say(f"{round_ + 1}: {positions} {turn.requests_per_second:.2f} requests/s")
    return compare(speeds["kept"], speeds["closed"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run with a small model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    asked = parser.parse_args(arguments)
    plan = QUICK if asked.quick else FULL
    settings = {**machine(), "clients": CLIENTS, "budget": BUDGET, "requests": REQUESTS}
    found = measure(asked.rounds, plan.hidden, plan.layers)
    ends = found.interval
    mark = Mark(
        f"{CLIENTS} clients, {BUDGET} tokens: requests/s with positions kept within 2 % of closed",
        f"{found:.3f}",
        None if ends is None else found.median >= 1 / TOLERANCE,
    )
    print(marks_table([mark]))
    write(asked.output, settings, {"ratios": list(found.pairs)}, [mark])
    return 1 if missed([mark]) and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
