# SPDX-License-Identifier: Apache-2.0
"""Tables and targets, from the turns about all images."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.measuring.pairs import Compared, compare
from benchmarks.measuring.report import Mark, table

Mode = Literal["independent", "conversation"]
MODES: Final[tuple[Mode, ...]] = ("independent", "conversation")
TITLES: Final = {
    "independent": "Five requests about one image, each with one question",
    "conversation": "Five turns of one conversation about one image",
}

STOCK: Final = "stock"
OFF: Final = "64 tokens, no feature cache"
CACHED: Final = "64 tokens, feature cache"
OWN: Final = "64 tokens, feature cache, own words"
COLUMNS: Final = (STOCK, OFF, CACHED, OWN)
MOST: Final = 0.35
"""Of the first question's TTFT, what the second may take with the cache."""


MOST_OF_STOCK: Final = 1.1
"""Of stock's TTFT, what later questions of a conversation may take."""


@dataclass(frozen=True)
class Series:
    """All questions about one image, in order."""

    ttfts: tuple[float, ...]
    """Seconds."""
    encoded: int | None
    """Images that were encoded for the second and later questions; None where
    the server does not count that."""
    prompt_tokens: tuple[int, ...]


def later(series: Sequence[Series], turn: int = 1) -> Compared:
    """Compare a later question's TTFT with the first one's, image by image."""
    return compare([one.ttfts[turn] for one in series], [one.ttfts[0] for one in series])


def against_stock(columns: Mapping[str, Sequence[Series]], column: str) -> Compared:
    """Compare the TTFT of all questions but the first with stock's, question by question."""
    own, stock = (
        [ttft for one in columns[name] for ttft in one.ttfts[1:]] for name in (column, STOCK)
    )
    return compare(own, stock)


def mode_table(found: Mapping[str, Sequence[Series]]) -> str:
    """Median TTFT of every question, and the second's against the first's."""
    questions = len(next(iter(found.values()))[0].ttfts)
    head = [
        "server", *(f"TTFT {number + 1}, ms" for number in range(questions)),
        "second / first (95 %)", "images encoded after the first question",
    ]  # fmt: skip
    rows = []
    for column, series in found.items():
        medians = [
            statistics.median(one.ttfts[number] for one in series) for number in range(questions)
        ]
        encoded = encoded_later(series)
        asked = len(series) * (questions - 1)
        rows.append(
            [
                column,
                *(f"{1000 * each:.0f}" for each in medians),
                later(series),
                "not counted" if encoded is None else f"{encoded} of {asked}",
            ]
        )
    return table(head, rows)


def encoded_later(series: Sequence[Series]) -> int | None:
    """Images that went through the tower again, all series together."""
    counts = [one.encoded for one in series]
    return None if None in counts else sum(count or 0 for count in counts)


def marks(found: Mapping[Mode, Mapping[str, Sequence[Series]]]) -> list[Mark]:
    """Judge the cache, if it was measured, in each mode."""
    judged = []
    for mode, columns in found.items():
        if CACHED not in columns:
            continue
        series = columns[CACHED]
        second, encoded = later(series), encoded_later(series)
        judged.append(
            Mark(
                f"{mode}: with the cache, the second question's TTFT at most {MOST} of the first's",
                str(second),
                None if second.interval is None else second.interval[1] <= MOST,
            )
        )
        judged.append(
            Mark(
                f"{mode}: with the cache, no image is encoded after the first question",
                "not counted" if encoded is None else f"{encoded} encoded",
                None if encoded is None else encoded == 0,
            )
        )
        if mode == "conversation" and STOCK in columns:
            for column in (CACHED, OWN):
                if column in columns:
                    ratio = against_stock(columns, column)
                    judged.append(
                        Mark(
                            f"{mode}: {column}: later questions' TTFT at most {MOST_OF_STOCK} of "
                            "stock's",
                            str(ratio),
                            None if ratio.interval is None else ratio.interval[1] <= MOST_OF_STOCK,
                        )
                    )
    return judged
