# SPDX-License-Identifier: Apache-2.0
"""What has to be reached on a GPU, held against the results file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.gpu import figures
from benchmarks.gpu.figures import BUDGETS, CLIENTS
from benchmarks.gpu.results import Results
from benchmarks.measuring.pairs import TOLERANCE
from benchmarks.measuring.report import Mark

ENGINES: Final = ("v2-bf16-graphs", "v1-bf16-graphs", "v2-float32-eager")
TESTED: Final = tuple(
    figures.of(f"{model}-{how}", figures.TESTS)
    for how in ("v2-eager", "v2-graphs", "v1-eager")
    for model in ("qwen2.5-vl", "qwen3-vl")
)
AT_MOST: Final = {
    figures.SELECTION_ONE: (0.5, " ms"),
    figures.SELECTION_32: (2.0, " ms"),
    figures.SELECTION_CROPS: (1.5, " ms"),
    figures.SELECTION_LIST: (1.5, " ms"),
    figures.tower_share(1): (5.0, " %"),
    figures.tower_share(32): (5.0, " %"),
    figures.SECOND_TTFT: (0.35, ""),
    figures.SECOND_ENCODED: (0.0, ""),
}
SPEEDUP: Final = 3.0
"""Times stock's requests/s at 32 clients with 64 tokens."""
NEXT_SPEEDUP: Final = 4.5
"""LLaVA-NeXT at 160 tokens; the paper's table has 4.23 on an A100."""


def marks(results: Results) -> list[Mark]:
    """Judge everything that was asked for; what was not measured is open."""
    return [*_kernels(results), *_answers(results), *_serving(results)]


def is_open(mark: Mark) -> bool:
    """Whether nothing was measured for it."""
    return mark.met is None


def _true(results: Results, name: str) -> Mark:
    found = results.figures.get(name)
    if found is None:
        return Mark(name, "open: not run", None)
    return Mark(name, f"{'yes' if found.value else 'no'}: {found.conditions}", bool(found.value))


def _number(results: Results, name: str, asked: str, holds: Callable[[float], bool]) -> Mark:
    number = results.number(name)
    if number is None:
        return Mark(f"{name}: {asked}", "open: not run", None)
    unit = results.figures[name].unit
    return Mark(f"{name}: {asked}", f"{number:g} {unit}".strip(), holds(number))


def _at_most(results: Results, name: str) -> Mark:
    limit, unit = AT_MOST[name]
    return _number(results, name, f"at most {limit:g}{unit}", lambda number: number <= limit)


def _kernels(results: Results) -> Iterator[Mark]:
    yield _true(results, figures.GPU_TESTS)
    for name in AT_MOST:
        if name.startswith("selection"):
            yield _at_most(results, name)
    yield _true(results, figures.NO_SYNC)


def _answers(results: Results) -> Iterator[Mark]:
    for engine in ENGINES:
        for name in (
            figures.RUNNER,
            figures.COUNTS_EXACT,
            figures.MIXED_EXACT,
            figures.PREFIX_CACHE,
            figures.ACCURACY_AS_CPU,
        ):
            yield _true(results, figures.of(engine, name))
    for engine in ("v2-bf16-graphs", "v1-bf16-graphs"):
        yield _true(results, figures.of(engine, figures.EQUALS_STOCK))
    for engine in ("v2-chunks", "v1-chunks"):
        yield _true(results, figures.of(engine, figures.CHUNKED))
    for name in TESTED:
        yield _true(results, name)


def _serving(results: Results) -> Iterator[Mark]:
    for clients in CLIENTS:
        # Without a budget nothing is saved: there stock's speed is all that can be asked for.
        name = figures.times_stock(figures.NONE, clients)
        least = 1 / TOLERANCE
        yield _number(
            results, name, f"at least {least:.2f}", lambda number: number >= 1 / TOLERANCE
        )
        for budget in BUDGETS:
            name = figures.times_stock(str(budget), clients)
            yield _number(results, name, "at least 1", lambda number: number >= 1)
    yield _number(
        results, figures.times_stock("64", 32), f"at least {SPEEDUP:g}",
        lambda number: number >= SPEEDUP,
    )  # fmt: skip
    for what in (figures.SCHEDULED, figures.WHOLE):
        name = figures.next_speedup(160, what)
        yield _number(
            results, name, f"at least {NEXT_SPEEDUP:g}", lambda number: number >= NEXT_SPEEDUP
        )
    for name in (figures.SECOND_TTFT, figures.SECOND_ENCODED):
        yield _at_most(results, name)
