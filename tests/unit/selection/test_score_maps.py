# SPDX-License-Identifier: Apache-2.0
"""The maps that people look at: the selection's own scores, and what was left uncovered."""

import math

import pytest
import torch

from flashvlm_vllm.selection import fused_scores
from flashvlm_vllm.selection.score_maps import coverage, score_maps


def unit(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_coverage_is_the_cosine_distance_to_the_nearest_that_stayed() -> None:
    told = coverage(3 * unit(10, 60, 180), unit(0, 90))
    assert told is not None
    distances = [1 - math.cos(math.radians(degrees)) for degrees in (10, 30, 90)]
    assert told.largest == pytest.approx(1.0)
    assert told.mean == pytest.approx(sum(distances) / 3)


def test_what_is_kept_whole_leaves_nothing_to_cover() -> None:
    assert coverage(torch.empty(0, 2), unit(0)) is None


def test_a_broken_vector_is_as_far_as_can_be_and_spoils_no_other() -> None:
    broken = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    told = coverage(broken, unit(0))
    assert told is not None
    assert (told.largest, told.mean) == (pytest.approx(2.0), pytest.approx(1.0))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
    told = score_maps(features, saliency, words)
    assert told.relevance is not None
    assert torch.equal(told.fused, fused_scores(features, saliency, words))
    for values in (told.saliency, told.relevance, told.fused):
        assert values.shape == (12,)
        assert values.min() == 0
        assert values.max() == pytest.approx(1.0, abs=1e-4)
    # The most relevant token is the one whose features are the word's.
    features[5] = words[0]
    told = score_maps(features, saliency, words[:1])
    assert told.relevance is not None
    assert told.relevance.argmax() == 5
    assert told.saliency.argmax() == saliency.argmax()


@pytest.mark.parametrize("words", [None, torch.empty(0, 6)])
def test_without_a_question_saliency_is_all_there_is(words: torch.Tensor | None) -> None:
    told = score_maps(torch.eye(6), torch.arange(6.0), words)
    assert told.relevance is None
    assert torch.equal(told.fused, told.saliency)
