# SPDX-License-Identifier: Apache-2.0
"""`flashvlm-2`: hand-computed scores, and the determinant that its choice maximises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.selection.determinant import largest_determinant
from flashvlm_vllm.selection.flashvlm_2 import (
    RELEVANCE_WEIGHT,
    coherent_scores,
    select_coherent,
    standardised,
)
from flashvlm_vllm.selection.neighbours import mean_of_near
from flashvlm_vllm.selection.partition import cosine_gram

from .conftest import Image, assert_exact, make_image

SIDE = 6
GRID = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))


def choose(image: Image, budget: int, text: Tensor | None = None) -> Tensor:
    places = torch.stack([torch.arange(len(image.features)), torch.zeros(len(image.features))], 1)
    return select_coherent(
        image.features, image.saliency, text, budget, image.diversity, places.long()
    )


@pytest.mark.parametrize("count", [1, 2, 3, 9, 24, 41])
def test_every_budget_is_met_exactly(count: int) -> None:
    image = make_image(count)
    for budget in range(1, count + 3):
        assert_exact(choose(image, budget, image.text), budget, count)
        assert_exact(choose(image, budget), budget, count)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, math.nan, math.inf, 3e38])
def test_identical_tokens_still_give_the_exact_count(value: float) -> None:
    alike = Image(*(torch.full_like(tensor, value) for tensor in make_image(19)))
    for budget in (1, 2, 9, 18):
        assert_exact(choose(alike, budget, alike.text), budget, 19)


def test_a_non_finite_token_or_word_does_not_affect_the_others() -> None:
    image = make_image(36)
    text = torch.cat([image.text, torch.full((1, image.text.shape[1]), math.nan)])
    whole = coherent_scores(image.features, image.saliency, image.text, GRID)
    broken_word = coherent_scores(image.features, image.saliency, text, GRID)
    torch.testing.assert_close(broken_word, whole)
    features, saliency = image.features.clone(), image.saliency.clone()
    features[7], saliency[7] = math.nan, math.nan
    assert coherent_scores(features, saliency, image.text, GRID).isfinite().all()


def test_neighbours_are_averaged_as_by_a_box_filter() -> None:
    values = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.avg_pool2d(
        values.view(1, 1, SIDE, SIDE), 3, stride=1, padding=1, count_include_pad=False
    )
    torch.testing.assert_close(mean_of_near(values, GRID), expected.flatten())
    # If a column is missing, as after unpadding, the remaining values are averaged.
    there = GRID[:, 1] != 2
    wide = torch.where(there, values, torch.nan).view(SIDE, SIDE)
    expected = torch.stack(
        [
            wide[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].nanmean()
            for row, column in GRID[there].tolist()
        ]
    )
    torch.testing.assert_close(mean_of_near(values[there], GRID[there]), expected)


def test_standardised_hand_computed_example() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 7.0])
    expected = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    torch.testing.assert_close(standardised(values), expected)
    columns = torch.stack([values, torch.full((4,), 0.1), 10 * values + 3], dim=1)
    scaled = standardised(columns)
    torch.testing.assert_close(scaled, torch.stack([expected, torch.zeros(4), expected], dim=1))


def planted() -> dict[str, Any]:
    """A uniform 6 x 6 image where two 2 x 2 objects each resemble one word; a third word is similar
    to everything.
    """
    generator = torch.Generator().manual_seed(3)
    words = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:3]
    features = 2.0 * words[2] + 0.3 * torch.randn(SIDE * SIDE, 12, generator=generator)
    for word, (row, column) in zip(words, ((0, 0), (4, 3)), strict=False):
        near = ((GRID - torch.tensor([row, column])) // 2 == 0).all(dim=1)
        features[near] += 0.8 * word
    return {"features": features, "words": words, "saliency": torch.ones(SIDE * SIDE)}


@pytest.mark.parametrize(("word", "corner"), [(0, (0, 0)), (1, (4, 3))])
def test_a_specific_word_outweighs_a_word_similar_to_everything(
    word: int, corner: tuple[int, int]
) -> None:
    image = planted()
    text = image["words"][[word, 2]]
    scores = coherent_scores(image["features"], image["saliency"], text, GRID)
    best = GRID[scores.argmax()]
    assert ((best - torch.tensor(corner)) // 2 == 0).all()


def test_without_a_question_only_saliency_counts() -> None:
    image = make_image(36)
    expected = mean_of_near(standardised(image.saliency.log()), GRID)
    torch.testing.assert_close(
        coherent_scores(image.features, image.saliency, None, GRID), expected
    )
    none = coherent_scores(image.features, image.saliency, image.text[:0], GRID)
    torch.testing.assert_close(none, expected)


def test_score_and_choice_equal_a_step_by_step_computation() -> None:
    image = make_image(36)
    unit = torch.nn.functional.normalize
    cosines = unit(image.features) @ unit(image.text).T
    by_word = (cosines - cosines.mean(0)) / cosines.std(0, correction=0)
    best = by_word.max(dim=1).values
    logs = image.saliency.log()
    raw = (logs - logs.mean()) / logs.std(correction=0)
    raw += RELEVANCE_WEIGHT * (best - best.mean()) / best.std(correction=0)
    score = mean_of_near(raw, GRID)
    found = coherent_scores(image.features, image.saliency, image.text, GRID)
    torch.testing.assert_close(found, score, atol=1e-4, rtol=1e-4)

    weight = ((score - score.mean()) / score.std(correction=0)).exp()
    kept = largest_determinant(cosine_gram(image.diversity), weight, 9).sort().values
    chosen = select_coherent(image.features, image.saliency, image.text, 9, image.diversity, GRID)
    assert chosen.tolist() == kept.tolist()


def test_places_of_another_shape_are_refused() -> None:
    image = make_image(9)
    with pytest.raises(ValueError, match=r"places is \(9, 3\); allowed: \(9, 2\)"):
        select_coherent(
            image.features, image.saliency, None, 2, image.diversity, torch.zeros(9, 3).long()
        )
