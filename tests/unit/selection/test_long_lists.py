# SPDX-License-Identifier: Apache-2.0
"""Lists too long to compare all pairs: exact counts, bounded memory, small quality loss."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.selection.clock import TensorMemory
from benchmarks.selection.in_blocks import log_determinant, pairs_up_to, smallest_distance
from flashvlm_vllm.selection import LanguageAttention, VisualTokens, long_lists, run_selector
from flashvlm_vllm.selection.baselines import cdpruner, divprune
from flashvlm_vllm.selection.determinant import largest_determinant, largest_determinant_of_any
from flashvlm_vllm.selection.neighbours import mean_of_near
from flashvlm_vllm.selection.partition import cosine_gram
from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.selection.workspace import workspace_bytes

visionzip_module = import_module("flashvlm_vllm.selection.baselines.visionzip")


def features_of(rows: int, columns: int, width: int, seed: int) -> Tensor:
    """Smooth over the image at two scales, with noise and a shared mean, as features of a tower."""
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
        attention=LanguageAttention(
            torch.rand(12, count, generator=random), torch.rand(2, 12, count, generator=random), 8
        ),
    )


@pytest.mark.parametrize(
    ("count", "budget"),
    [
        (4096, 600),
        (12_000, 1),
        (12_000, 2),
        (12_000, 900),
        pytest.param(12_000, 5_000, marks=pytest.mark.slow),
        pytest.param(12_000, 11_999, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_selector_keeps_the_exact_count_within_its_memory_bound(
    name: str, count: int, budget: int
) -> None:
    tokens = tokens_of(count, budget, width=256)
    with TensorMemory() as memory:
        selection = run_selector(name, BUILT_IN[name], tokens, trusted=False)
    assert len(selection.spots.unique()) == budget
    assert memory.peak < workspace_bytes(count, 256)
    # No list is compared with itself as a whole.
    assert memory.largest <= 4 * max(long_lists.MOST_PAIRED**2, count * 600)


def test_the_memory_bound_is_linear_in_the_number_of_tokens() -> None:
    sizes = [workspace_bytes(count, 4096) for count in (8192, 16_384, 32_768)]
    assert sizes[2] < 2.0 * sizes[1] < 4.0 * sizes[0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_repeated_runs_select_the_same_tokens(name: str) -> None:
    tokens = tokens_of(6_000, 300)
    first, second = (
        run_selector(name, BUILT_IN[name], tokens, trusted=True).spots for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_determinant_in_blocks_is_close_to_the_exact_one() -> None:
    features = features_of(80, 80, 512, seed=0)
    weight = features_of(80, 80, 1, seed=1)[:, 0].exp()
    kept = largest_determinant_of_any(features, weight, 400)
    exact = largest_determinant(cosine_gram(features), weight, 400)
    reached = log_determinant(features, weight, kept)
    best = log_determinant(features, weight, exact)
    by_weight = log_determinant(features, weight, weight.topk(400).indices)
    assert reached - by_weight > 0.99 * (best - by_weight)


def test_diversity_in_blocks_is_close_to_the_exact_one() -> None:
    features = features_of(80, 80, 512, seed=2)
    ones = torch.ones(len(features))
    kept = cdpruner(features, None, 400)
    with pairs_up_to(10_000):
        exact = cdpruner(features, None, 400)
    at_random = torch.randperm(6400, generator=torch.Generator().manual_seed(0))[:400]
    reached, best, random_score = (
        log_determinant(features, ones, each) for each in (kept, exact, at_random)
    )
    assert reached - random_score > 0.9 * (best - random_score)


def test_the_smallest_distance_in_blocks_is_close_to_the_exact_one() -> None:
    features = features_of(80, 80, 128, seed=3)
    kept = divprune(features, 300)
    with pairs_up_to(10_000):
        exact = divprune(features, 300)
    assert smallest_distance(features, kept) > 0.75 * smallest_distance(features, exact)


def test_short_lists_are_not_processed_in_blocks() -> None:
    features = features_of(64, 64, 32, seed=4)
    assert len(features) == long_lists.MOST_PAIRED
    with pairs_up_to(10_000):
        expected = divprune(features, 200), cdpruner(features, features[:3], 200)
    assert torch.equal(divprune(features, 200), expected[0])
    assert torch.equal(cdpruner(features, features[:3], 200), expected[1])


def test_the_mean_of_neighbours_covers_existing_places_only() -> None:
    random = torch.Generator().manual_seed(5)
    numbers = torch.arange(35)
    places = torch.stack([numbers // 7, numbers % 7], dim=1)
    places = places[torch.rand(35, generator=random) > 0.2]
    values = torch.randn(len(places), generator=random)
    near = ((places[:, None] - places[None]).abs() <= 1).all(dim=-1).float()
    torch.testing.assert_close(mean_of_near(values, places), near @ values / near.sum(dim=1))


def test_visionzip_merges_the_same_groups_with_and_without_a_matrix_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = tokens_of(2000, 300)
    product = run_selector("visionzip", BUILT_IN["visionzip"], tokens, trusted=True).merged
    monkeypatch.setattr(visionzip_module, "MOST_PAIRED", 100)
    by_group = run_selector("visionzip", BUILT_IN["visionzip"], tokens, trusted=True).merged
    torch.testing.assert_close(product, by_group, rtol=1e-5, atol=1e-5)
