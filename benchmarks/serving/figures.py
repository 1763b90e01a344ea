# SPDX-License-Identifier: Apache-2.0
"""Tables and targets, from the turns of all rounds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.measuring.metrics import blocks_per_request
from benchmarks.measuring.pairs import TOLERANCE, Compared, compare
from benchmarks.measuring.report import Mark, table
from benchmarks.measuring.turn import Turn, percentiles
from benchmarks.serving.plan import (
    COLUMNS,
    NONE,
    OUTPUT_TOKENS,
    STOCK,
    TEXT,
    Level,
)

MARKED: Final = "64"
GPU_SPEEDUP: Final = 3.0  # at 32 clients, with LLaVA-1.5-7B's shape
LEAST_SPEEDUP: Final = 2.0
LEAST_PREFILL: Final = 0.8
FEWEST_PAIRS: Final = 10


@dataclass
class Measured:
    """The measurements of one load."""

    level: Level
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    prompt_tokens: dict[str, float] = field(default_factory=dict)
    """Mean per request, as the server counts them."""
    preemptions: dict[str, int] = field(default_factory=dict)

    def speed(self, column: str) -> Compared:
        """Return requests/s relative to stock."""
        return compare(
            [turn.requests_per_second for turn in self.turns[column]],
            [turn.requests_per_second for turn in self.turns[STOCK]],
        )

    def prefill_share(self) -> Compared:
        """Return the time of the same prompt without image and output, relative to stock."""
        return compare(
            [turn.seconds for turn in self.turns[TEXT]],
            [turn.seconds for turn in self.turns[STOCK]],
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "turns": {
                name: [turn.as_json() for turn in turns] for name, turns in self.turns.items()
            },
            "prompt_tokens": self.prompt_tokens,
            "preemptions": self.preemptions,
        }


@dataclass(frozen=True)
class Residency:
    """The requests of a column that have KV blocks at the same time."""

    blocks: int
    """All there are."""
    block_size: int
    prompt_tokens: float
    clients: int
    seen: int

    @property
    def per_request(self) -> int:
        """KV blocks at the end of a request of the measured turns."""
        return blocks_per_request(self.prompt_tokens + OUTPUT_TOKENS, self.block_size)

    @property
    def computed(self) -> int:
        """The number of those that fit into the blocks."""
        return self.blocks // self.per_request


def level_table(measured: Measured) -> str:
    """One row per column: throughput, against stock, latencies over all requests."""
    head = (
        "budget", "requests/s", "times stock (95 %)",
        "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms", "TPOT p99, ms", "preemptions",
    )  # fmt: skip
    rows = []
    for column in COLUMNS:
        turns = measured.turns[column]
        ttft = percentiles([each for turn in turns for each in turn.ttfts])
        tpot = percentiles([each for turn in turns for each in turn.tpots])
        rows.append(
            (
                column,
                f"{statistics.median(turn.requests_per_second for turn in turns):.2f}",
                "1" if column == STOCK else measured.speed(column),
                *(f"{1000 * each:.0f}" for each in ttft),
                *(f"{1000 * each:.1f}" for each in tpot),
                measured.preemptions[column],
            )
        )
    return table(head, rows)


def residency_table(found: Mapping[str, Residency]) -> str:
    """KV blocks, and how many requests fit into them."""
    head = ("budget", "prompt tokens", "KV blocks per request", "fit at once", "seen running")
    rows = [
        (
            column,
            f"{one.prompt_tokens:.0f}",
            one.per_request,
            one.computed,
            f"{one.seen} of {one.clients} clients",
        )
        for column, one in found.items()
    ]
    return table(head, rows)


def prefill_lines(levels: Sequence[Measured]) -> str:
    """Return prefill's share of stock's time."""
    return "\n".join(
        f"* {one.level.name}: {one.prefill_share()}, a text of {one.prompt_tokens[TEXT]:.0f} "
        f"tokens for an image prompt of {one.prompt_tokens[STOCK]:.0f}"
        for one in levels
        if one.level.with_text
    )


def marks(levels: Sequence[Measured], *, on_gpu: bool = False) -> list[Mark]:
    """Return the targets; with too few rounds for an interval they are not judged."""
    found = [faster(one) for one in levels]
    if on_gpu:
        found += [faster(one, GPU_SPEEDUP) for one in levels if one.level.clients == 32]
    else:
        found += [twice(one) for one in levels if one.level.with_text and one.level.clients == 8]
    found += [no_cost(one) for one in levels if one.level.rounds >= FEWEST_PAIRS]
    return found


def faster(one: Measured, times: float = 1.0) -> Mark:
    """The whole interval of the budget's throughput is at least so many times stock's."""
    speed = one.speed(MARKED)
    met = None if speed.interval is None else speed.interval[0] >= times
    least = "stock's" if times == 1 else f"{times:g} times stock's"
    return Mark(
        f"{one.level.name}: requests/s at {MARKED} tokens at least {least}", str(speed), met
    )


def twice(one: Measured) -> Mark:
    """Twice stock's throughput, where prefill is most of stock's time."""
    speed, share = one.speed(MARKED), one.prefill_share()
    met = None
    if speed.interval is not None:
        met = speed.interval[0] >= LEAST_SPEEDUP and share.median >= LEAST_PREFILL
    return Mark(
        f"{one.level.name}, {OUTPUT_TOKENS} tokens of answer: at least {LEAST_SPEEDUP:.0f} times "
        f"stock's requests/s at {MARKED} tokens, prefill being {LEAST_PREFILL:.0%} of stock's time",
        f"{speed}, prefill {share}",
        met,
    )


def no_cost(one: Measured) -> Mark:
    """Without a budget, time per request is stock's: the interval holds 1 or ends below 1.02."""
    slower = compare(
        [turn.seconds for turn in one.turns[NONE]], [turn.seconds for turn in one.turns[STOCK]]
    )
    ends = slower.interval
    met = None if ends is None else ends[0] <= 1 or ends[1] <= TOLERANCE
    return Mark(
        f"{one.level.name}: time per request without a budget within the noise of stock's",
        f"{slower:.3f}",
        met,
    )
