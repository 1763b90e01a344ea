# SPDX-License-Identifier: Apache-2.0
"""Equation 8 and Algorithm 1 of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvlm_vllm.selection.partition import (
    GRAM_BLOCK_ROWS,
    cosine_gram,
    important_count,
    partition,
    rank,
    remove_near_duplicates,
)

from . import reference
from .conftest import make_image


@pytest.mark.parametrize(
    ("budget", "fraction", "important"),
    [(1, 0.5, 0), (2, 0.5, 1), (7, 0.5, 3), (64, 0.5, 32), (64, 0.75, 48), (5, 1.0, 5), (5, 0, 0)],
)
def test_the_budget_split_rounds_towards_diversity(
    budget: int, fraction: float, important: int
) -> None:
    assert important_count(budget, fraction) == important


def test_equal_scores_rank_by_index() -> None:
    assert rank(torch.tensor([1.0, 2.0, 2.0, 1.0, 3.0, 2.0])).tolist() == [4, 1, 2, 5, 0, 3]


def test_one_round_hand_computed_example() -> None:
    # A is 0, 2, 4 with largest similarity 0.9 (to 5), 0.2 (to 1), 0.7 (to 3); B is 1, 3, 5.
    # 0 and 2 are nearly equal, but both are in A and therefore not compared.
    similarity = torch.zeros(6, 6)
    for left, right, value in ((0, 5, 0.9), (1, 2, 0.2), (3, 4, 0.7), (0, 2, 0.99)):
        similarity[left, right] = similarity[right, left] = value
    assert remove_near_duplicates(similarity, 5, 1).tolist() == [4, 2, 1, 3, 5]
    assert remove_near_duplicates(similarity, 4, 2).tolist() == [2, 1, 3, 5]


def test_exact_duplicates_are_removed_first() -> None:
    features = torch.eye(16)
    copies = [0, 2, 6, 10]
    for position in copies:
        features[position] = features[position + 1]
    kept = remove_near_duplicates(cosine_gram(features), 12, 4)
    assert sorted(kept.tolist()) == [i for i in range(16) if i not in copies]


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 40),
    data=st.data(),
    removed_per_round=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_a_single_gram_matrix_gives_the_same_result_as_the_loop_over_rounds(
    count: int, data: st.DataObject, removed_per_round: int, seed: int
) -> None:
    """Small integers: products are exact and ties are frequent, so even the order must agree."""
    keep = data.draw(st.integers(1, count))
    random = torch.Generator().manual_seed(seed)
    features = torch.randint(-2, 3, (count, 4), generator=random).float()
    kept = remove_near_duplicates(features @ features.T, keep, removed_per_round)
    expected, _ = reference.algorithm_1(features.tolist(), range(count), keep, removed_per_round)
    assert kept.tolist() == expected


@pytest.mark.parametrize("count", [576, 331])
def test_a_single_gram_matrix_gives_the_same_result_for_long_lists(count: int) -> None:
    """Real-valued features in float64, where rounding cannot swap two neighbours."""
    features = make_image(count).diversity.double()
    features /= features.norm(dim=1, keepdim=True)
    left = torch.arange(count)
    while len(left) > 32:
        compared, anchors = left[0::2], left[1::2]
        largest = (features[compared] @ features[anchors].T).max(dim=1).values
        removed = min(8, len(left) - 32)
        left = torch.cat([compared[largest.argsort(descending=True)][removed:], anchors])
    assert torch.equal(remove_near_duplicates(features @ features.T, 32, 8), left)


@pytest.mark.parametrize(("count", "budget"), [(576, 128), (576, 64), (576, 32), (577, 33)])
def test_number_of_rounds_is_as_published(
    count: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorts = []
    argsort = torch.argsort

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        sorts.append(args)
        return argsort(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    similarity = cosine_gram(make_image(count - budget // 2).diversity)
    monkeypatch.setattr(torch, "argsort", counted)
    remove_near_duplicates(similarity, budget - budget // 2, 8)
    assert len(sorts) == math.ceil((count - budget) / 8)


@pytest.mark.parametrize("count", [1, GRAM_BLOCK_ROWS, GRAM_BLOCK_ROWS + 1, 3 * GRAM_BLOCK_ROWS])
def test_the_gram_matrix_in_blocks_equals_the_whole_matrix(count: int) -> None:
    features = make_image(count).diversity
    gram = cosine_gram(features)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(gram.double(), unit @ unit.T, rtol=0, atol=1e-6)
    assert torch.equal(gram, gram.T)


def test_a_non_finite_or_zero_row_has_zero_similarity_and_does_not_affect_others() -> None:
    features = make_image(20).diversity
    intact = cosine_gram(features)
    for row, value in ((3, math.nan), (8, math.inf), (14, 0.0)):
        features[row] = value
    gram = cosine_gram(features)
    broken = torch.zeros(20, dtype=torch.bool)
    broken[[3, 8, 14]] = True
    assert (gram[broken] == 0).all() and (gram[:, broken] == 0).all()
    torch.testing.assert_close(gram[~broken][:, ~broken], intact[~broken][:, ~broken])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_similarity_is_computed_in_float32(dtype: torch.dtype) -> None:
    features = make_image(50).diversity.to(dtype)
    gram = cosine_gram(features)
    assert gram.dtype == torch.float32
    assert torch.equal(gram, cosine_gram(features.float()))


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(1, 39), seed=st.integers(0, 10_000), fraction=st.sampled_from([0, 0.5, 1])
)
def test_a_partition_with_many_ties_equals_the_slow_reference(
    budget: int, seed: int, fraction: float
) -> None:
    """Rows of +-1 in 16 dimensions have norm 4: unit vectors and cosines are exact."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (40, 16), generator=random).float() * 2 - 1
    signs[:, 4:] = signs[:1, 4:]
    scores = torch.randint(0, 6, (40,), generator=random).float()
    kept = partition(scores, signs, budget, fraction, 8)

    ranking = sorted(range(40), key=lambda i: -float(scores[i]))
    important = int(fraction * budget)
    expected = ranking[:important]
    if budget > important:
        expected += reference.algorithm_1(
            signs.tolist(), ranking[important:], budget - important, 8
        )[0]
    assert kept.tolist() == sorted(expected)


def test_kept_indices_can_index_a_tensor_that_requires_grad() -> None:
    features = make_image(40).diversity.requires_grad_()
    kept = remove_near_duplicates(cosine_gram(features.detach()), 9, 8)
    features[kept].square().sum().backward()
    assert features.grad is not None
    assert features.grad.any(dim=1).nonzero()[:, 0].tolist() == sorted(kept.tolist())
