# SPDX-License-Identifier: Apache-2.0
"""Kinds of requests, and the table of their stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.measuring.report import table

BUDGET: Final = 64

Stages = Mapping[str, float]
"""Milliseconds by stage, and ``prompt_tokens``."""


@dataclass(frozen=True)
class Row:
    """One kind of request."""

    name: str
    cache: str
    budget: int | None
    is_second: bool = False
    """Whether another question about the image came before."""


ROWS: Final = (
    Row("no budget", "without", None),
    Row(f"{BUDGET} tokens", "without", BUDGET),
    Row(f"{BUDGET} tokens, second question, before", "without", BUDGET, is_second=True),
    Row(f"{BUDGET} tokens, second question, now", "with", BUDGET, is_second=True),
)


def limit(rows: Mapping[str, Stages]) -> tuple[float, float]:
    """Return the prefill at the budget, and proportional to its tokens, in milliseconds."""
    whole, pruned = rows[ROWS[0].name], rows[ROWS[1].name]
    share = pruned["prompt_tokens"] / whole["prompt_tokens"]
    return pruned["prefill"], whole["prefill"] * share


def report(rows: Mapping[str, Stages]) -> str:
    """Return the stages of every row, and the limit of prefill, as Markdown."""
    stages = [name for name in rows[ROWS[0].name] if name != "prompt_tokens"]
    cells = [
        (name, f"{found['prompt_tokens']:.0f}", *(f"{found[each]:.1f}" for each in stages))
        for name, found in rows.items()
    ]
    prefill, proportional = limit(rows)
    return (
        table(("ms", "prompt tokens", *stages), cells)
        + f"\n\nPrefill at {BUDGET} tokens: {prefill:.1f} ms; proportional to the prompt's tokens "
        f"it would be {proportional:.1f} ms."
    )
