# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every built-in selector on one image, by size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch

from benchmarks.measuring.report import Mark
from benchmarks.selection.clock import DEVICE, median_ms, memory_kept, peak_mib
from benchmarks.selection.growth import growth_exponent
from benchmarks.selection.synthetic import Image, grid_of, large_image
from flashvlm_vllm.selection import VisualTokens, long_lists, run_selector
from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.selection.selectors import Selection

COUNTS: Final = (576, 1024, 2048, 4096, 8192, 16384, 32768)
KEPT: Final = 16
"""One token of so many stays."""
WIDTH: Final = 1280
HEADS: Final = 16
"""Both of Qwen2.5-VL's tower."""

Quantity = Literal["time", "time, memory kept", "memory"]
MARKS: Final[dict[Quantity, float]] = {"time": 1.2, "time, memory kept": 1.2, "memory": 1.1}
"""Exponents allowed."""
RANGES: Final = (
    (COUNTS[0], COUNTS[-1]),
    (long_lists.MOST_PAIRED, COUNTS[-1]),
    (2 * long_lists.MOST_PAIRED, COUNTS[-1]),
)
"""From and to which number of tokens an exponent is fitted. At `MOST_PAIRED` tokens all pairs are
compared, above it pairs within blocks; so the last range alone is of one and the same algorithm."""


@dataclass(frozen=True)
class Cost:
    """One selector on one image, one token of `KEPT` kept."""

    selector: str
    tokens: int
    ms: float
    kept_ms: float
    """The time where the process keeps freed memory: without what the kernel takes to give it."""
    peak_mib: float

    def of(self, quantity: Quantity) -> float:
        """Milliseconds or MiB."""
        return {"time": self.ms, "time, memory kept": self.kept_ms, "memory": self.peak_mib}[
            quantity
        ]


def measure_selectors() -> list[Cost]:
    """Every selector at every size."""
    usual = {each: (_ms(call), peak_mib(call)) for each, call in _calls()}
    with memory_kept():
        kept = {each: _ms(call) for each, call in _calls()}
    return [Cost(*each, ms, kept[each], mib) for each, (ms, mib) in usual.items()]


def _calls() -> Iterator[tuple[tuple[str, int], Callable[[], Selection]]]:
    for count in COUNTS:
        tokens = visual_tokens(large_image(count, WIDTH, seed=count), count // KEPT)
        for name, selector in BUILT_IN.items():
            yield (name, count), partial(run_selector, name, selector, tokens, trusted=True)


def _ms(call: Callable[[], Selection]) -> float:
    # Always a median: a first call also allocates memory, which would change the slope.
    return median_ms(call, longest_ms=math.inf)


def visual_tokens(image: Image, budget: int) -> VisualTokens:
    """One image as a selector sees it, on the device measured.

    Args:
        image: of any size, laid out as `grid_of` says.
        budget: tokens to keep.

    """
    count = len(image.features)
    random = torch.Generator().manual_seed(count)
    image = image.to(DEVICE)
    place, (_, columns) = torch.arange(count, device=DEVICE), grid_of(count)
    keys = torch.randn(count, HEADS, image.diversity.shape[1] // HEADS, generator=random)
    return VisualTokens(
        budget=budget,
        projected=image.features,
        features=image.diversity,
        saliency=image.saliency,
        text=image.text,
        keys=keys.to(DEVICE),
        places=torch.stack([place // columns, place % columns], dim=1),
        seed=0,
    )


def exponents(costs: Sequence[Cost], quantity: Quantity, ends: tuple[int, int]) -> dict[str, float]:
    """By selector, how a quantity grows between two numbers of tokens, ends included."""
    found = {}
    for name in dict.fromkeys(cost.selector for cost in costs):
        fitted = [c for c in costs if c.selector == name and ends[0] <= c.tokens <= ends[1]]
        found[name] = growth_exponent([c.tokens for c in fitted], [c.of(quantity) for c in fitted])
    return found


def exponent_marks(costs: Sequence[Cost]) -> list[Mark]:
    """Compare every selector with the largest exponents, in each range; name the worst ones."""
    found = []
    for quantity, allowed in MARKS.items():
        for first, last in RANGES:
            by_name = exponents(costs, quantity, (first, last))
            beyond = {name: each for name, each in by_name.items() if each > allowed}
            named = beyond or {max(by_name, key=by_name.__getitem__): max(by_name.values())}
            found.append(
                Mark(
                    f"every built-in selector: exponent of {quantity}, {first:,} to {last:,} "
                    f"tokens: <= {allowed}",
                    ("" if beyond else "at most ")
                    + ", ".join(f"{each:.2f} ({name})" for name, each in named.items()),
                    not beyond,
                )
            )
    return found
