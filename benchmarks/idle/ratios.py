# SPDX-License-Identifier: Apache-2.0
"""From the rounds of a benchmark to ratios with intervals, a verdict and tables.

**Ratio.** In each round every server is measured once on the same requests. A round's ratio is
another server's figure over the first stock server's, oriented so that above 1 means slower
(requests/s enter as time per request). What makes a whole round slow cancels out.

**Interval.** That of ``benchmarks.measuring.pairs``.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.measuring.pairs import TOLERANCE, interval

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
    """How a server compares with stock in one figure; above 1 is slower."""

    server: str
    figure: str
    rounds: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Judge the whole interval: all of it beyond 2 % is slower, none of it is not."""
        if self.low > TOLERANCE:
            return "slower"
        return "not slower" if self.high <= TOLERANCE else "undecided"


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


def missed(compared: Sequence[Ratio]) -> list[str]:
    """Say what ``--check`` refuses; nothing when all is well."""
    return [
        f"{r.server} / {STOCK}, {FIGURES[r.figure]}: slower by over {TOLERANCE - 1:.0%}: "
        f"{r.median:.3f}, 95 % interval {r.low:.3f} to {r.high:.3f}"
        + (" (two stock servers: this machine cannot tell)" if r.server == STOCK_AGAIN else "")
        for r in compared
        if r.figure in CHECKED and r.verdict == "slower"
    ]


def servers_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Medians over the rounds, as a Markdown table."""
    lines = [
        f"| server | {' | '.join(FIGURES.values())} |",
        f"|---|{'---|' * len(FIGURES)}",
    ]
    for server, measured in runs.items():
        medians = (statistics.median(run[figure] for run in measured) for figure in FIGURES)
        lines.append(f"| {server} | {' | '.join(f'{value:.2f}' for value in medians)} |")
    return "\n".join(lines)


def ratios_table(compared: Sequence[Ratio]) -> str:
    """Ratios to stock with their intervals, as a Markdown table."""
    lines = [
        "| figure | ratio | median | 95 % interval | verdict |",
        "|---|---|---|---|---|",
    ]
    for r in compared:
        name = FIGURES[r.figure].removesuffix(", ms")
        name = "time per request" if r.figure == "request_throughput" else name
        lines.append(
            f"| {name} | {r.server} / {STOCK} | {r.median:.3f} "
            f"| {r.low:.3f} to {r.high:.3f} | {r.verdict} |"
        )
    return "\n".join(lines)
