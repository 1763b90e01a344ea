# SPDX-License-Identifier: Apache-2.0
"""The targets on a GPU, compared with the results file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.gpu import keys
from benchmarks.gpu.comparing import AGAINST_STOCK, ENCODERS
from benchmarks.gpu.keys import CLIENTS
from benchmarks.gpu.results import Results
from benchmarks.measuring.pairs import TOLERANCE
from benchmarks.measuring.report import Mark
from benchmarks.serving.plan import BUDGETS, NONE

NOT_RUN: Final = "not run"
ENGINES: Final = ("v2-bf16-graphs", "v1-bf16-graphs", "v2-float32-eager")
TESTED: Final = tuple(
    keys.of(f"{model}-{how}", keys.TESTS)
    for how in ("v2-eager", "v2-graphs", "v1-eager")
    for model in ("qwen2.5-vl", "qwen3-vl")
)
AT_MOST: Final = {
    keys.SELECTION_ONE: (0.5, " ms"),
    keys.SELECTION_32: (2.0, " ms"),
    keys.SELECTION_CROPS: (1.5, " ms"),
    keys.SELECTION_LIST: (1.5, " ms"),
    keys.tower_share(1): (5.0, " %"),
    keys.tower_share(32): (5.0, " %"),
    keys.SECOND_TTFT: (0.35, ""),
    keys.SECOND_ENCODED: (0.0, ""),
}
SPEEDUP: Final = 3.0
"""Requests/s relative to stock at 32 clients with 64 tokens."""
NEXT_SPEEDUP: Final = 4.5
"""LLaVA-NeXT at 160 tokens; the paper's table has 4.23 on an A100."""


def marks(results: Results) -> list[Mark]:
    """Return all targets; those without a measurement are not judged."""
    return [*_kernels(results), *_answers(results), *_serving(results)]


def is_open(mark: Mark) -> bool:
    """Whether the target has no measurement."""
    return mark.met is None


def _true(results: Results, name: str) -> Mark:
    found = results.figures.get(name)
    if found is None:
        return Mark(name, NOT_RUN, None)
    return Mark(name, f"{'yes' if found.value else 'no'}: {found.conditions}", bool(found.value))


def _number(results: Results, name: str, asked: str, holds: Callable[[float], bool]) -> Mark:
    number = results.number(name)
    if number is None:
        return Mark(f"{name}: {asked}", NOT_RUN, None)
    unit = results.figures[name].unit
    return Mark(f"{name}: {asked}", f"{number:g} {unit}".strip(), holds(number))


def _at_most(results: Results, name: str) -> Mark:
    limit, unit = AT_MOST[name]
    return _number(results, name, f"at most {limit:g}{unit}", lambda number: number <= limit)


def _kernels(results: Results) -> Iterator[Mark]:
    yield _true(results, keys.GPU_TESTS)
    for name in AT_MOST:
        if name.startswith("selection"):
            yield _at_most(results, name)
    yield _true(results, keys.NO_SYNC)


def _answers(results: Results) -> Iterator[Mark]:
    for engine in ENGINES:
        for name in (
            keys.RUNNER,
            keys.COUNTS_EXACT,
            keys.MIXED_EXACT,
            keys.PREFIX_CACHE,
            keys.ACCURACY_AS_CPU,
        ):
            yield _true(results, keys.of(engine, name))
    for engine in AGAINST_STOCK:
        yield _true(results, keys.of(engine, keys.EQUALS_STOCK))
    for engine in ENCODERS:
        for name in (keys.WHOLE_ENCODED, keys.PRUNED_ENCODED):
            yield _true(results, keys.of(engine, name))
    for engine in ("v2-chunks", "v1-chunks"):
        yield _true(results, keys.of(engine, keys.CHUNKED))
    for name in TESTED:
        yield _true(results, name)


def _serving(results: Results) -> Iterator[Mark]:
    for clients in CLIENTS:
        # Without a budget nothing is saved: the target is the speed of stock.
        name = keys.times_stock(NONE, clients)
        least = 1 / TOLERANCE
        yield _number(
            results, name, f"at least {least:.2f}", lambda number: number >= 1 / TOLERANCE
        )
        for budget in BUDGETS:
            name = keys.times_stock(str(budget), clients)
            yield _number(results, name, "at least 1", lambda number: number >= 1)
    yield _number(
        results, keys.times_stock("64", 32), f"at least {SPEEDUP:g}",
        lambda number: number >= SPEEDUP,
    )  # fmt: skip
    for what in (keys.SCHEDULED, keys.WHOLE):
        name = keys.next_speedup(160, what)
        yield _number(
            results, name, f"at least {NEXT_SPEEDUP:g}", lambda number: number >= NEXT_SPEEDUP
        )
    for name in (keys.SECOND_TTFT, keys.SECOND_ENCODED):
        yield _at_most(results, name)
