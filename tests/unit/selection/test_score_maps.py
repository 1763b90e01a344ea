# SPDX-License-Identifier: Apache-2.0
"""The score maps of an explanation: the scores of the selection, and the coverage."""

import math

import pytest
import torch

from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.selection.score_maps import coverage, score_maps


def unit(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_coverage_is_the_cosine_distance_to_the_nearest_kept_token() -> None:
    found = coverage(3 * unit(10, 60, 180), unit(0, 90))
    assert found is not None
    distances = [1 - math.cos(math.radians(degrees)) for degrees in (10, 30, 90)]
    assert found.largest == pytest.approx(1.0)
    assert found.mean == pytest.approx(sum(distances) / 3)


def test_without_dropped_tokens_there_is_no_coverage() -> None:
    assert coverage(torch.empty(0, 2), unit(0)) is None


def test_a_non_finite_vector_has_the_largest_distance_and_does_not_affect_others() -> None:
    broken = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    found = coverage(broken, unit(0))
    assert found is not None
    assert (found.largest, found.mean) == (pytest.approx(2.0), pytest.approx(1.0))


def test_computing_in_blocks_gives_the_same_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(101, 8, generator=generator)
    kept = torch.randn(7, 8, generator=generator)
    at_once = coverage(tokens, kept)
    monkeypatch.setattr("flashvlm_vllm.selection.score_maps._PAIRS_AT_ONCE", 20)
    assert coverage(tokens, kept) == at_once


def test_the_maps_are_the_steps_of_the_fused_score() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 6, generator=generator)
    saliency = torch.rand(12, generator=generator)
    words = torch.randn(3, 6, generator=generator)
    maps = score_maps(features, saliency, words)
    assert maps.relevance is not None
    assert torch.equal(maps.fused, fused_scores(features, saliency, words))
    for values in (maps.saliency, maps.relevance, maps.fused):
        assert values.shape == (12,)
        assert values.min() == 0
        assert values.max() == pytest.approx(1.0, abs=1e-4)
    # The most relevant token is the one with the features of the word.
    features[5] = words[0]
    maps = score_maps(features, saliency, words[:1])
    assert maps.relevance is not None
    assert maps.relevance.argmax() == 5
    assert maps.saliency.argmax() == saliency.argmax()


@pytest.mark.parametrize("words", [None, torch.empty(0, 6)])
def test_without_a_question_the_fused_score_is_the_saliency(words: torch.Tensor | None) -> None:
    maps = score_maps(torch.eye(6), torch.arange(6.0), words)
    assert maps.relevance is None
    assert torch.equal(maps.fused, maps.saliency)
