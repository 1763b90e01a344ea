# SPDX-License-Identifier: Apache-2.0
"""Ratios of the rounds with intervals, targets and tables.

**Ratio.** In each round every server is measured once on the same requests. A round's ratio is
another server's figure over the first stock server's, oriented so that above 1 means slower
(requests/s enter as time per request). What makes a whole round slow cancels out.

**Interval.** That of ``benchmarks.measuring.pairs``.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.measuring.pairs import TOLERANCE, interval, is_within
from benchmarks.measuring.report import Mark, marks_table, table

Run = Mapping[str, float]
"""What ``vllm bench serve`` reports of one run; the fields of ``FIGURES`` are used."""
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
    rounds: tuple[float, ...]
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
    """Compare two servers round by round."""
    pairs = [(a[figure], b[figure]) for a, b in zip(other, stock, strict=True)]
    if figure == "request_throughput":
        pairs = [(b, a) for a, b in pairs]
    rounds = tuple(a / b for a, b in pairs)
    low, high = interval(rounds)
    return Ratio(server, figure, rounds, statistics.median(rounds), low, high)


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
    """Return medians over the rounds."""
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
