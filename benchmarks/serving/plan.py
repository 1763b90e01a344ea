# SPDX-License-Identifier: Apache-2.0
"""The loads, the number of rounds, and the order of turns."""

from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

from benchmarks.measuring.order import alternating, rotated

Traffic = Literal["random", "photos"]

STOCK: Final = "stock"
NONE: Final = "no budget"
TEXT: Final = "text only"
"""Stock vLLM, a prompt as long as the image's, one output token: the time of prefill alone."""
BUDGETS: Final = (128, 64, 32)
COLUMNS: Final = (STOCK, NONE, *(str(budget) for budget in BUDGETS))
TEXT_TOKENS: Final = 32  # of the question, besides the 576 of the image
OUTPUT_TOKENS: Final = 16
SEEDS_PER_ROUND: Final = 10
ROUNDS_PER_LEVEL: Final = 1000


@dataclass(frozen=True)
class Level:
    """A load, and how often each column takes a turn under it."""

    traffic: Traffic
    clients: int
    rounds: int
    prompts: int
    with_text: bool = False
    """Whether prompts without an image are measured too."""

    @property
    def name(self) -> str:
        """Its name in tables and JSON."""
        return f"{self.traffic}, {self.clients} client{'s' if self.clients > 1 else ''}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that take a turn."""
        return (*COLUMNS, TEXT) if self.with_text else COLUMNS


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    hidden: int
    layers: int
    levels: tuple[Level, ...]
    most_clients: int
    """The most clients with which resident requests are counted."""


# Six rounds are the fewest that make a 95 % interval.
FULL: Final = Plan(
    hidden=1024,
    layers=20,
    levels=(
        Level("random", 1, rounds=10, prompts=3, with_text=True),
        Level("random", 8, rounds=10, prompts=8, with_text=True),
        Level("random", 32, rounds=6, prompts=32),
        Level("photos", 8, rounds=6, prompts=8),
    ),
    most_clients=64,
)
QUICK: Final = Plan(
    hidden=256,
    layers=2,
    levels=(
        Level("random", 1, rounds=2, prompts=2, with_text=True),
        Level("random", 8, rounds=2, prompts=8, with_text=True),
        Level("random", 32, rounds=1, prompts=32),
        Level("photos", 8, rounds=1, prompts=8),
    ),
    most_clients=16,
)


def budget_of(column: str) -> int | None:
    """Return the budget of a column's requests."""
    return int(column) if column.isdecimal() else None


def uses_plugin(column: str) -> bool:
    """Return whether a column is measured on the server with the plugin."""
    return column not in (STOCK, TEXT)


def order(columns: tuple[str, ...], round_: int) -> tuple[str, ...]:
    """Return the order of a round; over the rounds each column is in each place, both ways.

    Stock and the plugin without a budget, which should be equal, follow each other directly and
    alternate in being first.
    """
    blocks = [columns[:2], *((column,) for column in columns[2:])]
    turned = chain.from_iterable(rotated(blocks, round_ // 2))
    return tuple(alternating(list(turned), round_))


def seed(level: int, round_: int, column: str) -> int:
    """Return the seed of a turn's random requests, which no other turn sends.

    Stock and the plugin without a budget are different servers and get the same requests.
    """
    columns = (NONE, *COLUMNS[2:], TEXT)
    place = columns.index(NONE if column == STOCK else column)
    return 1 + (level * ROUNDS_PER_LEVEL + round_) * SEEDS_PER_ROUND + place
