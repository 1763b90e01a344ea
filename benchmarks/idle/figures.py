# SPDX-License-Identifier: Apache-2.0
"""Ratios of the starts with intervals, targets and tables.

**Ratio.** After each start every server has several turns, on the same requests as the others. Its
figure is the median of its turns. A start's ratio is another server's figure over the first stock
server's, oriented so that above 1 means slower (requests/s enter as time per request).

**Interval.** That of ``benchmarks.measuring.pairs``, over the starts: it covers the difference
between two processes, which is the same in every turn of a start.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.measuring.pairs import TOLERANCE, interval, is_within
from benchmarks.measuring.report import Mark, marks_table, table

Run = Mapping[str, float]
"""What ``vllm bench serve`` reports of one run; the fields of ``FIGURES`` are used."""
Turns = dict[str, list[dict[str, float]]]
"""Runs of each server after one start."""
Verdict = Literal["slower", "not slower", "undecided"]

STOCK: Final = "stock"
STOCK_AGAIN: Final = "stock again"

FIGURES: Final = {
    "request_throughput": "requests/s",
    "mean_ttft_ms": "mean TTFT, ms",
    "p99_ttft_ms": "p99 TTFT, ms",
    "mean_tpot_ms": "mean TPOT, ms",
}
CHECKED: Final = ("request_throughput", "mean_ttft_ms")


@dataclass(frozen=True)
class Ratio:
    """A server compared with stock in one figure; above 1 is slower."""

    server: str
    figure: str
    starts: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Judge the whole interval: all of it beyond 2 % is slower, none of it is not."""
        verdicts: dict[bool | None, Verdict] = {
            False: "slower", True: "not slower", None: "undecided",
        }  # fmt: skip
        return verdicts[is_within((self.low, self.high))]


def ratio(server: str, figure: str, other: Sequence[Run], stock: Sequence[Run]) -> Ratio:
    """Compare two servers start by start."""
    pairs = [(a[figure], b[figure]) for a, b in zip(other, stock, strict=True)]
    if figure == "request_throughput":
        pairs = [(b, a) for a, b in pairs]
    starts = tuple(a / b for a, b in pairs)
    low, high = interval(starts)
    return Ratio(server, figure, starts, statistics.median(starts), low, high)


def medians(starts: Sequence[Turns]) -> dict[str, list[Run]]:
    """Return a server's median turn, figure by figure, in each start."""
    return {
        server: [
            {key: statistics.median(turn[key] for turn in start[server]) for key in FIGURES}
            for start in starts
        ]
        for server in starts[0]
    }


def ratios(runs: Mapping[str, Sequence[Run]]) -> list[Ratio]:
    """Compare every other server with stock, figure by figure."""
    return [
        ratio(server, figure, measured, runs[STOCK])
        for figure in FIGURES
        for server, measured in runs.items()
        if server != STOCK
    ]


def marks(compared: Sequence[Ratio]) -> list[Mark]:
    """Judge time per request and mean TTFT of every server but the first stock one."""
    met: dict[Verdict, bool | None] = {"slower": False, "not slower": True, "undecided": None}
    return [
        Mark(
            f"{r.server} / {STOCK}, {name_of(r.figure)}: not slower by over {TOLERANCE - 1:.0%}"
            + (" (if missed, this machine is too noisy)" if r.server == STOCK_AGAIN else ""),
            f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})",
            met[r.verdict],
        )
        for r in compared
        if r.figure in CHECKED
    ]


def name_of(figure: str) -> str:
    """Return the name of a figure's ratio."""
    if figure == "request_throughput":
        return "time per request"
    return FIGURES[figure].removesuffix(", ms")


def report(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return targets and tables as Markdown."""
    compared = ratios(runs)
    parts = [marks_table(marks(compared)), servers_table(runs), ratios_table(compared)]
    return "\n\n".join(parts)


def servers_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return medians over the starts."""
    rows = [
        [server, *(f"{statistics.median(run[each] for run in measured):.2f}" for each in FIGURES)]
        for server, measured in runs.items()
    ]
    return table(["server", *FIGURES.values()], rows)


def ratios_table(compared: Sequence[Ratio]) -> str:
    """Return ratios to stock with their intervals."""
    rows = [
        [
            name_of(r.figure),
            f"{r.server} / {STOCK}",
            f"{r.median:.3f}",
            f"{r.low:.3f} to {r.high:.3f}",
            r.verdict,
        ]
        for r in compared
    ]
    return table(["figure", "ratio", "median", "95 % interval", "verdict"], rows)
