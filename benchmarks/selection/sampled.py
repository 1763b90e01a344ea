# SPDX-License-Identifier: Apache-2.0
"""The saliency of large images: a sample of queries, compared with all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.selection.clock import DEVICE, median_ms
from benchmarks.selection.large_tower import HEADS, WIDTH, Rates
from benchmarks.selection.selectors import KEPT, visual_tokens
from benchmarks.selection.synthetic import attention_inputs, large_image
from benchmarks.selection.trained_tower import Look, TrainedTower
from flashvlm_vllm.selection import VisualTokens, run_selector
from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.vision import attention

COUNTS: Final = (4225, 9216, 16384)
"""Squares; the first is the smallest above `MOST_QUERIES`."""
SELECTORS: Final = ("flashvlm", "flashvlm-2", "vispruner")
"""Those that use the saliency and choose rather than merge."""
COMPARED_HEADS: Final = 2
"""All queries of these, in float64 too, take seconds. Times are of all heads."""
SEEDS: Final = 2
PHOTOS: Final = ("astronaut", "coffee", "cat")
PHOTO_COUNTS: Final = COUNTS[:2]
"""The whole tower has to run; the largest size would take minutes."""
QUERIES_AT_ONCE: Final = 256


@dataclass(frozen=True)
class Agreement:
    """Attention of one kind at one size: means over its images, shares of 1."""

    source: str
    tokens: int
    correlation: float
    """Of the scores from the sample with those from all queries."""
    best_shared: float
    """Of the best of `KEPT`, how many are the best by all queries too."""
    kept_shared: dict[str, float]
    """By selector: of the tokens kept, how many are kept with the saliency of all queries."""
    kept_shared_rounded: dict[str, float]
    """The same of all queries and unit features in float64, rounded to float32 at the end."""


@dataclass(frozen=True)
class SaliencyTime:
    """Milliseconds of the saliency of one image, all heads of Qwen2.5-VL's tower."""

    patches: int
    ms: float
    """As it is computed: from a sample beyond `MOST_QUERIES`."""
    attention_ms: float
    """Of that layer's own attention; computed from `Rates`."""


@contextmanager
def all_queries() -> Iterator[None]:
    """As if every image were small enough to ask all queries."""
    with patch.object(attention, "MOST_QUERIES", max(COUNTS)):
        yield


def received_in_float64(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention received from all queries, (T,) float64, of (1, T, H, d) each."""
    keys = key[0].double().permute(1, 2, 0)
    received = torch.zeros(keys.shape[-1], dtype=torch.float64, device=key.device)
    for block in query[0].double().transpose(0, 1).split(QUERIES_AT_ONCE, dim=1):
        received += (block @ keys * scale).softmax(dim=-1).sum(dim=(0, 1))
    return received


def shared(first: Tensor, second: Tensor) -> float:
    """Share of the first one's tokens that the second one has, too; (T,) distinct indices each."""
    return float(torch.isin(first, second).double().mean())


def measure_saliency_times(rates: Rates) -> list[SaliencyTime]:
    """The largest number of patches that are all asked, and the sizes beyond."""
    found = []
    for count in (attention.MOST_QUERIES, *COUNTS):
        inputs = attention_inputs(count, HEADS, WIDTH // HEADS, seed=0)
        query, key = (each.to(DEVICE) for each in inputs)
        ms = median_ms(partial(attention.received_attention, query, key, (WIDTH // HEADS) ** -0.5))
        found.append(SaliencyTime(count, ms, rates.full_attention_ms(count)))
    return found


Images = Callable[[int], Look]
"""One image at any number of tokens."""


@torch.inference_mode()
def measure_agreement() -> list[Agreement]:
    """Synthetic attention, and that of a trained tower on photographs, at every size."""
    tower = TrainedTower()
    drawn: list[Images] = [partial(_synthetic, seed) for seed in range(SEEDS)]
    photographs: list[Images] = [partial(tower.look, name) for name in PHOTOS]
    return [
        _mean(source, count, [_compare(look(count)) for look in looks])
        for source, looks, counts in (
            ("synthetic", drawn, COUNTS),
            ("the small VLM's tower, photographs", photographs, PHOTO_COUNTS),
        )
        for count in counts
    ]


def _synthetic(seed: int, count: int) -> Look:
    inputs = attention_inputs(count, COMPARED_HEADS, WIDTH // HEADS, seed)
    query, key = (each.to(DEVICE) for each in inputs)
    return Look(query, key, visual_tokens(large_image(count, WIDTH, seed), count // KEPT))


Compared = tuple[float, float, dict[str, float], dict[str, float]]
"""The numbers of `Agreement`, in its order, of one image."""


def _compare(look: Look) -> Compared:
    query, key, tokens = look
    heads, scale = query.shape[2], query.shape[3] ** -0.5
    sample = attention.received_attention(query, key, scale)[0] / heads
    with all_queries():
        whole = attention.received_attention(query, key, scale)[0] / heads
    rounded = (received_in_float64(query, key, scale) / heads).float()

    exact = _kept(replace(tokens, saliency=whole))
    by_sample = _kept(replace(tokens, saliency=sample))
    # Of unit length already, by float64: their cosines differ in the last bits only.
    double = tokens.features.double()
    unit = (double / double.norm(dim=1, keepdim=True)).float()
    again = _kept(replace(tokens, saliency=rounded, features=unit))
    return (
        float(torch.corrcoef(torch.stack([sample, whole]))[0, 1]),
        shared(sample.topk(tokens.budget).indices, whole.topk(tokens.budget).indices),
        {name: shared(by_sample[name], exact[name]) for name in SELECTORS},
        {name: shared(again[name], exact[name]) for name in SELECTORS},
    )


def _kept(tokens: VisualTokens) -> dict[str, Tensor]:
    return {
        name: run_selector(name, BUILT_IN[name], tokens, trusted=True).spots for name in SELECTORS
    }


def _mean(source: str, count: int, images: list[Compared]) -> Agreement:
    correlations, best, kept, rounded = zip(*images, strict=True)
    return Agreement(
        source,
        count,
        statistics.mean(correlations),
        statistics.mean(best),
        *(
            {name: statistics.mean(each[name] for each in rows) for name in SELECTORS}
            for rows in (kept, rounded)
        ),
    )
