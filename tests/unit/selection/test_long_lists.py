# SPDX-License-Identifier: Apache-2.0
"""Lists that are too long to compare all pairs: exact numbers, bounded memory, little lost."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.selection.clock import TensorMemory
from benchmarks.selection.in_blocks import log_determinant, pairs_up_to, smallest_distance
from flashvlm_vllm.selection import VisualTokens, long_lists, run_selector
from flashvlm_vllm.selection.baselines import cdpruner, divprune
from flashvlm_vllm.selection.determinant import largest_determinant, largest_determinant_of_any
from flashvlm_vllm.selection.flashvlm_2 import mean_of_near
from flashvlm_vllm.selection.partition import cosine_gram
from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.selection.workspace import workspace_bytes

visionzip_module = import_module("flashvlm_vllm.selection.baselines.visionzip")


def features_of(rows: int, columns: int, width: int, seed: int) -> Tensor:
    """Smooth over the image at two scales, with noise and a shared mean, as a tower's are."""
    random = torch.Generator().manual_seed(seed)

    def field(side: int) -> Tensor:
        coarse = torch.randn(1, 32, side, side, generator=random)
        smooth = F.interpolate(coarse, size=(rows, columns), mode="bicubic")
        return smooth[0].flatten(1).T @ torch.randn(32, width, generator=random) / 6

    noise = 0.35 * torch.randn(rows * columns, width, generator=random)
    return field(6) + 0.6 * field(24) + noise + 0.8 * torch.randn(width, generator=random)


def tokens_of(count: int, budget: int, columns: int = 128, width: int = 32) -> VisualTokens:
    random = torch.Generator().manual_seed(count)
    features = torch.randn(count, width, generator=random)
    numbers = torch.arange(count)
    return VisualTokens(
        budget=budget,
        projected=features,
        features=features,
        saliency=torch.rand(count, generator=random),
        text=torch.randn(8, width, generator=random),
        keys=torch.randn(count, 2, 8, generator=random),
        places=torch.stack([numbers // columns, numbers % columns], dim=1),
        seed=3,
    )


@pytest.mark.parametrize(
    ("count", "budget"),
    [(4096, 600), (12_000, 1), (12_000, 2), (12_000, 900), (12_000, 5_000), (12_000, 11_999)],
)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_selector_returns_exactly_as_many_and_keeps_to_its_memory(
    name: str, count: int, budget: int
) -> None:
    tokens = tokens_of(count, budget, width=256)
    with TensorMemory() as memory:
        selection = run_selector(name, BUILT_IN[name], tokens, trusted=False)
    assert len(selection.spots.unique()) == budget
    assert memory.peak < workspace_bytes(count, 256)
    # No list is compared with itself as a whole.
    assert memory.largest <= 4 * max(long_lists.MOST_PAIRED**2, count * 600)


def test_memory_grows_with_the_tokens_alone() -> None:
    sizes = [workspace_bytes(count, 4096) for count in (8192, 16_384, 32_768)]
    assert sizes[2] < 2.0 * sizes[1] < 4.0 * sizes[0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_list_gets_the_same_tokens(name: str) -> None:
    tokens = tokens_of(6_000, 300)
    first, second = (
        run_selector(name, BUILT_IN[name], tokens, trusted=True).spots for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_determinant_in_blocks_is_that_over_all_pairs() -> None:
    features = features_of(80, 80, 512, seed=0)
    weight = features_of(80, 80, 1, seed=1)[:, 0].exp()
    kept = largest_determinant_of_any(features, weight, 400)
    exact = largest_determinant(cosine_gram(features), weight, 400)
    reached = log_determinant(features, weight, kept)
    best = log_determinant(features, weight, exact)
    by_weight = log_determinant(features, weight, weight.topk(400).indices)
    assert reached - by_weight > 0.99 * (best - by_weight)


def test_plain_diversity_in_blocks() -> None:
    features = features_of(80, 80, 512, seed=2)
    ones = torch.ones(len(features))
    kept = cdpruner(features, None, 400)
    with pairs_up_to(10_000):
        exact = cdpruner(features, None, 400)
    at_random = torch.randperm(6400, generator=torch.Generator().manual_seed(0))[:400]
    reached, best, chance = (
        log_determinant(features, ones, each) for each in (kept, exact, at_random)
    )
    assert reached - chance > 0.9 * (best - chance)


def test_the_smallest_distance_in_blocks() -> None:
    features = features_of(80, 80, 128, seed=3)
    kept = divprune(features, 300)
    with pairs_up_to(10_000):
        exact = divprune(features, 300)
    assert smallest_distance(features, kept) > 0.75 * smallest_distance(features, exact)


def test_short_lists_are_left_as_they_were() -> None:
    features = features_of(64, 64, 32, seed=4)
    assert len(features) == long_lists.MOST_PAIRED
    with pairs_up_to(10_000):
        expected = divprune(features, 200), cdpruner(features, features[:3], 200)
    assert torch.equal(divprune(features, 200), expected[0])
    assert torch.equal(cdpruner(features, features[:3], 200), expected[1])


def test_the_mean_of_near_places_is_over_the_places_that_are_there() -> None:
    random = torch.Generator().manual_seed(5)
    numbers = torch.arange(35)
    places = torch.stack([numbers // 7, numbers % 7], dim=1)
    places = places[torch.rand(35, generator=random) > 0.2]
    values = torch.randn(len(places), generator=random)
    near = ((places[:, None] - places[None]).abs() <= 1).all(dim=-1).float()
    torch.testing.assert_close(mean_of_near(values, places), near @ values / near.sum(dim=1))


def test_visionzip_adds_up_the_same_groups_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(2000, 300)
    product = run_selector("visionzip", BUILT_IN["visionzip"], tokens, trusted=True).merged
    monkeypatch.setattr(visionzip_module, "MOST_PAIRED", 100)
    by_group = run_selector("visionzip", BUILT_IN["visionzip"], tokens, trusted=True).merged
    torch.testing.assert_close(product, by_group, rtol=1e-5, atol=1e-5)
