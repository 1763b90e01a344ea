# SPDX-License-Identifier: Apache-2.0
"""Equations 1 to 7 of the paper."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flashvlm_vllm.selection import ABLATIONS, SelectionConfig, fused_scores
from flashvlm_vllm.selection.relevance import (
    aggregate,
    attenuate_below_gate,
    gated_text,
    quantile,
    query_relevance,
    sharpen,
    text_similarity,
)
from flashvlm_vllm.selection.scaling import min_max

from . import reference
from .conftest import make_image

CONFIG = SelectionConfig()
CONFIGS = {
    "published": CONFIG,
    "normalized_last": SelectionConfig(query_gate="normalized_last"),
    "normalized_first": SelectionConfig(query_gate="normalized_first"),
    "wide_gate": SelectionConfig(gate_fraction=0.2, attenuation=0.0),
    **ABLATIONS,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_slow_reference(name: str, seed: int) -> None:
    image = make_image(40, seed)
    scores = fused_scores(image.features, image.saliency, image.text, CONFIGS[name])
    expected = reference.scores(
        image.features.tolist(), image.saliency.tolist(), image.text.tolist(), CONFIGS[name]
    )
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=2e-5)


def test_min_max_hand_computed_example() -> None:
    scaled = min_max(torch.tensor([3.0, 1.0, 2.0]), 0.5)
    torch.testing.assert_close(scaled, torch.tensor([0.8, 0.0, 0.4]))


def test_min_max_of_a_constant_is_zero() -> None:
    assert min_max(torch.full((5,), 0.3), 1e-6).tolist() == [0.0] * 5


def test_min_max_treats_non_finite_scores_as_the_lowest() -> None:
    values = torch.tensor([2.0, math.nan, 1.0, math.inf, -math.inf])
    torch.testing.assert_close(min_max(values, 1e-6), torch.tensor([1.0, 0, 0, 0, 0]))
    assert min_max(torch.full((3,), math.nan), 1e-6).tolist() == [0.0] * 3


@pytest.mark.parametrize("count", [256, 576, 2880])
def test_sharpening_equals_its_closed_form(count: int) -> None:
    similarity = 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    sharpened = min_max(
        sharpen(similarity, CONFIG.sharpening_temperature, CONFIG.sharpening_power, CONFIG.epsilon),
        CONFIG.epsilon,
    )
    closed = torch.exp(250 * (similarity.double() - similarity.double().max()))
    closed = (closed - closed.min()) / (closed.max() - closed.min())
    torch.testing.assert_close(sharpened.double(), closed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "passing"),
    [(256, 2), (576, 3), (1024, 6), (1225, 7), (2048, 11), (2880, 15)],
)
def test_the_expected_number_of_tokens_passes_the_gate(count: int, passing: int) -> None:
    relevance = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float() + 1
    gated = attenuate_below_gate(relevance, CONFIG.gate_fraction, CONFIG.attenuation)
    unchanged = gated == relevance
    assert int(unchanged.sum()) == passing
    assert relevance[unchanged].min() > relevance[~unchanged].max()
    torch.testing.assert_close(gated[~unchanged], 0.1 * relevance[~unchanged])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.995, 1.0])
def test_quantile_interpolates_like_torch(share: float) -> None:
    values = torch.randn(101, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(quantile(values, share)[0], torch.quantile(values, share))


def test_aggregation_lies_between_mean_and_maximum() -> None:
    similarity = torch.tensor([[0.1, 0.5, 0.3]])
    torch.testing.assert_close(aggregate(similarity, 1e-4), torch.tensor([0.5]))
    torch.testing.assert_close(aggregate(similarity, 1e4), torch.tensor([0.3]), rtol=0, atol=1e-4)


def test_only_the_scaled_gate_changes_the_relevance() -> None:
    image = make_image(80)
    ungated = gated_text(image.text, "none", CONFIG.epsilon)
    for mode in ("normalized_last", "normalized_first"):
        same = gated_text(image.text, mode, CONFIG.epsilon)
        torch.testing.assert_close(same, ungated, rtol=1e-5, atol=1e-6)

    norms = image.text.norm(dim=1)
    scaled = gated_text(image.text, "scaled", CONFIG.epsilon)
    torch.testing.assert_close(scaled.norm(dim=1), norms / norms.max(), rtol=1e-5, atol=1e-6)
    relevance = query_relevance(image.features, image.text, CONFIG)
    without = query_relevance(image.features, image.text, replace(CONFIG, query_gate="none"))
    assert (relevance - without).abs().max() > 0.01


def test_similarity_is_the_cosine() -> None:
    features = torch.tensor([[3.0, 4.0], [-10.0, 0.0], [0.0, 0.0]])
    text = gated_text(torch.tensor([[2.0, 0.0]]), "none", CONFIG.epsilon)
    torch.testing.assert_close(
        text_similarity(features, text), torch.tensor([[0.6], [-1.0], [0.0]])
    )


def test_the_token_that_matches_the_question_scores_highest() -> None:
    image = make_image(60)
    wanted = 37
    text = 3 * image.features[wanted : wanted + 1]
    assert int(fused_scores(image.features, None, text).argmax()) == wanted


def test_a_non_finite_word_is_ignored() -> None:
    image = make_image(60)
    broken = torch.cat([image.text, torch.full_like(image.text[:1], math.nan)])
    torch.testing.assert_close(
        fused_scores(image.features, image.saliency, broken),
        fused_scores(image.features, image.saliency, image.text),
        rtol=0,
        atol=1e-5,
    )


def test_a_non_finite_patch_scores_lowest_and_does_not_affect_others() -> None:
    image = make_image(60)
    features = image.features.clone()
    features[11] = math.nan
    scores = fused_scores(features, image.saliency, image.text)
    others = torch.arange(60) != 11
    intact = fused_scores(image.features, image.saliency, image.text)
    torch.testing.assert_close(scores[others], intact[others], rtol=0, atol=2e-3)
    linear = query_relevance(features, image.text, replace(CONFIG, sharpening=False))
    assert int(linear.argmin()) == 11


def test_saliency_decides_among_irrelevant_tokens() -> None:
    image = make_image(200)
    relevance = query_relevance(image.features, image.text, CONFIG)
    irrelevant = (relevance < CONFIG.epsilon).nonzero()[:, 0]
    assert len(irrelevant) > 10
    scores = fused_scores(image.features, image.saliency, image.text)[irrelevant]
    steps = scores[image.saliency[irrelevant].argsort()].diff()
    # The saliency also has a floor, so the lowest may tie.
    assert (steps >= 0).all()
    assert (steps > 0).sum() >= len(steps) - 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_computed_in_float32(dtype: torch.dtype) -> None:
    image = make_image(120)
    features, saliency, text, _ = (tensor.to(dtype) for tensor in image)
    scores = fused_scores(features, saliency, text)
    assert scores.dtype == torch.float32
    expected = fused_scores(features.float(), saliency.float(), text.float())
    assert torch.equal(scores, expected)


def test_scores_do_not_require_grad() -> None:
    image = make_image(20)
    scores = fused_scores(image.features.requires_grad_(), image.saliency, image.text)
    assert not scores.requires_grad
