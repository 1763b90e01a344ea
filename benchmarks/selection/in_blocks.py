# SPDX-License-Identifier: Apache-2.0
"""Quality of the selection in blocks, compared with the same selection over all pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.selection.clock import milliseconds
from benchmarks.selection.selectors import KEPT, WIDTH, visual_tokens
from benchmarks.selection.synthetic import large_image
from flashvlm_vllm.selection import VisualTokens, long_lists, run_selector
from flashvlm_vllm.selection.baselines import random_tokens
from flashvlm_vllm.selection.baselines.cdpruner import question_relevance
from flashvlm_vllm.selection.flashvlm_2 import HIGHEST, coherent_scores, standardised
from flashvlm_vllm.selection.partition import cosine_gram
from flashvlm_vllm.selection.registry import BUILT_IN

COUNTS: Final = (6400, 9216)
SEEDS: Final = 3
CHANCES: Final = 5
"""Random choices averaged."""
JITTER: Final = 1e-9
"""Added to the diagonal, so that the determinant of a random choice has a logarithm."""


@dataclass(frozen=True)
class InBlocks:
    """One of `GOALS` at one size: means over `SEEDS` images."""

    selector: str
    tokens: int
    goal: str
    chance: float
    """Reached by tokens drawn at random."""
    reached: float
    """In blocks."""
    exact: float
    """By the same greedy choice over all pairs."""
    share: float
    """Of the way from chance to exact, image by image."""
    kept_shared: float
    """Of the tokens kept, how many the choice over all pairs keeps too."""
    ms: float
    exact_ms: float


@contextmanager
def pairs_up_to(most: int, block: int = long_lists.BLOCK) -> Iterator[None]:
    """Compare all pairs of lists of so many tokens, longer ones in blocks of that length."""
    with patch.multiple(long_lists, MOST_PAIRED=most, BLOCK=block):
        yield


def log_determinant(features: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Logarithm of ``det(diag(w) S diag(w))`` over the kept tokens, `S` their cosines.

    Args:
        features: (N, C).
        weight: (N,) above 0.
        kept: (T,) int64, distinct.

    """
    kernel = cosine_gram(features[kept]).double()
    kernel += JITTER * torch.eye(len(kept), device=kernel.device)
    return float(torch.logdet(kernel) + 2 * weight[kept].double().log().sum())


def smallest_distance(features: Tensor, kept: Tensor) -> float:
    """1 - cosine of the two nearest kept tokens; (N, C) and (T,) int64, T at least 2."""
    return float((1.0 - cosine_gram(features[kept])).fill_diagonal_(torch.inf).min())


def _of_flashvlm_2(tokens: VisualTokens, kept: Tensor) -> float:
    scores = coherent_scores(tokens.projected, tokens.saliency, tokens.text, tokens.places)
    weight = standardised(scores).clamp(-HIGHEST, HIGHEST).exp()
    return log_determinant(tokens.features, weight, kept)


def _of_cdpruner(tokens: VisualTokens, kept: Tensor) -> float:
    weight = torch.ones_like(tokens.saliency)
    if tokens.text is not None:
        weight = question_relevance(tokens.projected, tokens.text, negated=False)
    return log_determinant(tokens.projected, weight, kept)


def _of_divprune(tokens: VisualTokens, kept: Tensor) -> float:
    return smallest_distance(tokens.projected, kept)


@dataclass(frozen=True)
class Goal:
    """The quantity that a selector maximises."""

    selector: str
    what: str
    reached: Callable[[VisualTokens, Tensor], float]
    asked: bool = True
    """Whether there is a question; without one, `cdpruner` weighs all tokens alike."""


GOALS: Final = {
    "flashvlm-2": Goal("flashvlm-2", "log-determinant", _of_flashvlm_2),
    "cdpruner": Goal("cdpruner", "log-determinant", _of_cdpruner),
    "cdpruner, no question": Goal("cdpruner", "log-determinant", _of_cdpruner, asked=False),
    "divprune": Goal("divprune", "smallest distance", _of_divprune, asked=False),
}


@torch.inference_mode()
def measure_in_blocks() -> list[InBlocks]:
    """Every selector that compares all pairs, at every size."""
    found = []
    for count in COUNTS:
        rows: dict[str, list[list[float]]] = {name: [] for name in GOALS}
        for seed in range(SEEDS):
            tokens = visual_tokens(large_image(count, WIDTH, seed), count // KEPT)
            for name, goal in GOALS.items():
                rows[name].append(_measure(goal, tokens))
        for name, goal in GOALS.items():
            means = map(statistics.mean, zip(*rows[name], strict=True))
            found.append(InBlocks(name, count, goal.what, *means))
    return found


def _measure(goal: Goal, tokens: VisualTokens) -> list[float]:
    """The numbers of `InBlocks`, in its order."""
    if not goal.asked:
        tokens = replace(tokens, text=None)
    count, budget = len(tokens.projected), tokens.budget
    ms, kept = milliseconds(_kept, goal.selector, tokens)
    with pairs_up_to(count):
        exact_ms, exact = milliseconds(_kept, goal.selector, tokens)
    drawn = [random_tokens(count, budget, each).to(kept.device) for each in range(CHANCES)]
    chance = statistics.mean(goal.reached(tokens, each) for each in drawn)
    reached, best = goal.reached(tokens, kept), goal.reached(tokens, exact)
    share = (reached - chance) / (best - chance)
    alike = float(torch.isin(kept, exact).double().mean())
    return [chance, reached, best, share, alike, ms, exact_ms]


def _kept(name: str, tokens: VisualTokens) -> Tensor:
    return run_selector(name, BUILT_IN[name], tokens, trusted=True).spots
