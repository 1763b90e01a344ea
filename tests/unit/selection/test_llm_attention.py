# SPDX-License-Identifier: Apache-2.0
"""`llm-attention`, and the selectors by FastV's and SparseVLM's scores, on scores by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashvlm_vllm.selection import LanguageAttention, VisualTokens, run_selector
from flashvlm_vllm.selection.baselines import fastv_boundary, sparsevlm_boundary
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.llm_attention import (
    AVERAGED,
    SHARPNESS,
    WEIGHT_POWER,
    attended_scores,
    select_attended,
)
from flashvlm_vllm.selection.neighbours import checkerboard
from flashvlm_vllm.selection.registry import BUILT_IN

ROW = torch.stack([torch.zeros(5, dtype=torch.int64), torch.arange(5)], dim=1)
APART = torch.eye(5)
"""Features at right angles: the determinant keeps the highest scores."""
NAN, INFINITE = float("nan"), float("inf")


def averaged(values: list[float], times: int = AVERAGED) -> list[float]:
    """Average each number of one row of tokens with its neighbours."""
    for _ in range(times):
        near = [values[max(0, at - 1) : at + 2] for at in range(len(values))]
        values = [sum(each) / len(each) for each in near]
    return values


def test_the_score_is_the_square_of_the_largest_over_the_words_averaged_over_neighbours() -> None:
    read = torch.tensor([[[0.0, 0.0, 0.9, 0.0, 0.0], [0.1, 0.0, 0.3, 0.0, 0.8]]])
    largest = [0.1, 0.0, 0.9, 0.0, 0.8]
    mean = sum(largest) / 5
    expected = averaged([(each / mean) ** SHARPNESS for each in largest])
    torch.testing.assert_close(attended_scores(read, ROW), torch.tensor(expected))
    # A mean over the words would prefer the third token to the last.
    best = sorted(range(5), key=lambda at: -expected[at])[:2]
    assert select_attended(read, 2, APART, ROW).tolist() == sorted(best)


def test_a_layer_that_reads_few_tokens_counts_more_than_one_that_reads_many() -> None:
    spread, peaked = [3.0, 3.0, 0.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 1.0]
    apart = torch.stack([torch.zeros(5, dtype=torch.int64), 3 * torch.arange(5)], dim=1)
    scores = attended_scores(torch.tensor([[spread], [peaked]]), apart)
    # 12 / 5 and 1 / 5 are the layers' means.
    second = (3.0 / 2.4) ** SHARPNESS
    expected = [second, second, 0.0, second, second + 5.0**SHARPNESS]
    torch.testing.assert_close(scores, torch.tensor(expected))
    # How much a layer reads in all does not matter.
    more = [9 * each for each in peaked]
    scaled = attended_scores(torch.tensor([[spread], [more]]), apart)
    torch.testing.assert_close(scaled, scores)


def test_equal_scores_keep_the_lower_index() -> None:
    for budget in range(1, 5):
        kept = select_attended(torch.full((2, 2, 5), 0.25), budget, APART, ROW)
        assert kept.tolist() == list(range(budget))
    assert fastv_boundary(torch.full((2, 5), 0.25), 3).tolist() == [0, 1, 2]
    embeddings = torch.ones(5, 4), torch.ones(2, 4)
    assert sparsevlm_boundary(torch.full((3, 5), 0.2), *embeddings, 3).tolist() == [0, 1, 2]


def test_where_scores_are_flat_the_kept_tokens_differ() -> None:
    # Two pairs of equal tokens and one more: the highest scores are all in the first pair.
    features = torch.eye(3)[[0, 0, 1, 1, 2]]
    read = torch.tensor([[[0.30, 0.30, 0.25, 0.25, 0.2]]])
    apart = torch.stack([torch.zeros(5, dtype=torch.int64), 3 * torch.arange(5)], dim=1)
    assert select_attended(read, 3, features, apart).tolist() == [0, 2, 4]
    # A clear peak keeps its region, equal or not.
    read = torch.tensor([[[9.0, 8.0, 0.0, 0.0, 0.0]]])
    assert select_attended(read, 1, features, apart).tolist() == [0]


def test_the_weight_in_the_determinant_is_a_power_of_the_score() -> None:
    drawn = torch.Generator().manual_seed(15)  # All three powers keep other tokens.
    read = torch.rand(2, 3, 40, generator=drawn)
    features = torch.randn(40, 8, generator=drawn)
    places = torch.stack([torch.zeros(40, dtype=torch.int64), 3 * torch.arange(40)], dim=1)
    scores = attended_scores(read, places)

    def kept(power: float) -> list[int]:
        weight = (scores / scores.mean()).pow(power)
        return sorted(largest_determinant_of_any(features, weight, 6).tolist())

    assert WEIGHT_POWER == 1.5
    assert select_attended(read, 6, features, places).tolist() == kept(1.5)
    assert kept(1.0) != kept(1.5) != kept(2.0)


def test_a_token_that_was_not_read_gets_a_score_from_those_beside_it() -> None:
    places = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    read = torch.zeros(144)
    read[checkerboard(places)] = 0.1
    inside = ((places >= 4) & (places < 8)).all(dim=1)
    read[inside] *= 10
    scores = attended_scores(read[None, None], places)
    away = ((places < 1) | (places > 10)).any(dim=1)
    assert (inside & (read == 0)).sum() == 8
    assert scores[inside & (read == 0)].min() > 2 * scores[away].max()


def test_a_budget_of_all_tokens_keeps_all() -> None:
    assert select_attended(torch.rand(2, 2, 5), 9, APART, ROW).tolist() == [0, 1, 2, 3, 4]


def test_what_is_not_finite_counts_as_nothing() -> None:
    broken = torch.tensor([[NAN, INFINITE, 0.5, -INFINITE, 0.1], [NAN, 0.2, NAN, 0.0, NAN]])
    whole = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.1], [0.0, 0.2, 0.0, 0.0, 0.0]])
    assert torch.equal(attended_scores(broken[None], ROW), attended_scores(whole[None], ROW))
    assert fastv_boundary(torch.tensor([[NAN, INFINITE, 0.5, -INFINITE, 0.1]]), 2).tolist() == [
        2,
        4,
    ]
    for budget in (1, 3):
        embeddings = torch.full((5, 4), NAN), torch.full((1, 4), INFINITE)
        kept = sparsevlm_boundary(torch.full((1, 5), NAN), *embeddings, budget)
        assert kept.tolist() == list(range(budget))


def test_tokens_beside_a_missing_place_are_averaged_over_those_that_exist() -> None:
    read = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    apart = ROW.clone()
    apart[2:, 1] += 1  # No token between the second and the third.
    expected = averaged([0.0, 0.0]) + averaged([5.0**SHARPNESS, 0.0, 0.0])
    torch.testing.assert_close(attended_scores(read, apart), torch.tensor(expected))


def test_tokens_of_different_time_steps_are_no_neighbours() -> None:
    weighted = torch.zeros(1, 10)
    weighted[0, 2] = 1.0
    tokens = VisualTokens(
        budget=7,
        projected=torch.ones(10, 4),
        features=torch.eye(10),
        saliency=torch.ones(10),
        text=torch.ones(1, 4),
        keys=None,
        places=ROW.repeat(2, 1),
        seed=0,
        times=torch.arange(2).repeat_interleave(5),
        attention=LanguageAttention(weighted, weighted.expand(2, 1, 10), 1),
    )
    chosen = run_selector("llm-attention", BUILT_IN["llm-attention"], tokens, trusted=False)
    # The first frame by its score, then ties: at the same places of one frame they would differ.
    assert chosen.spots.tolist() == [0, 1, 2, 3, 4, 5, 6]
    flipped = weighted.flip(1)
    later = replace(tokens, attention=LanguageAttention(flipped, flipped.expand(2, 1, 10), 1))
    chosen = run_selector("llm-attention", BUILT_IN["llm-attention"], later, trusted=False)
    assert chosen.spots.tolist() == [0, 1, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: {**given, "budget": 0}, "budget"),
        (lambda given: {**given, "read": torch.zeros(2, 5)}, "read"),
        (lambda given: {**given, "diversity_features": APART[:4]}, "diversity_features"),
        (lambda given: {**given, "places": ROW[:4]}, r"places is \(4, 2\); allowed: \(5, 2\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    change: Callable[[dict[str, object]], dict[str, object]], message: str
) -> None:
    given = {
        "read": torch.zeros(2, 2, 5),
        "budget": 2,
        "diversity_features": APART,
        "places": ROW,
    }
    with pytest.raises(ValueError, match=message):
        select_attended(**change(given))  # type: ignore[arg-type]


def test_fastv_reads_the_last_word_only() -> None:
    attention = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.1], [0.0, 0.3, 0.1, 0.2, 0.0]])
    assert fastv_boundary(attention, 2).tolist() == [1, 3]


def test_sparsevlm_reads_the_words_that_resemble_the_image() -> None:
    image = torch.eye(4)[[0, 0, 0, 0, 1]]
    words = 4 * torch.eye(4)[[0, 2, 1]]
    attention = torch.tensor(
        [
            [0.0, 0.2, 0.0, 0.3, 0.0],  # The only rater: four of five tokens look like it.
            [0.9, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.9, 0.0, 0.0],
            [0.0, 0.0, 0.9, 0.0, 0.9],  # Of the template.
        ]
    )
    share = (image @ words.T).softmax(dim=1).mean(dim=0)
    assert (share > share.mean()).tolist() == [True, False, False]
    assert sparsevlm_boundary(attention, image, words, 2).tolist() == [1, 3]


def test_sparsevlm_reads_all_words_if_all_resemble_the_image_equally() -> None:
    image, words = torch.ones(5, 4), torch.ones(2, 4)
    attention = torch.tensor([[0.4, 0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.5, 0.0, 0.1]])
    assert sparsevlm_boundary(attention, image, words, 2).tolist() == [0, 2]


def asked(attention: LanguageAttention | None, text: Tensor | None) -> VisualTokens:
    random = torch.Generator().manual_seed(0)
    return VisualTokens(
        budget=6,
        projected=torch.randn(25, 4, generator=random),
        features=torch.randn(25, 4, generator=random),
        saliency=torch.rand(25, generator=random),
        text=text,
        keys=None,
        places=torch.cartesian_prod(torch.arange(5), torch.arange(5)),
        seed=0,
        attention=attention,
    )


def kept(name: str, tokens: VisualTokens) -> list[int]:
    return run_selector(name, BUILT_IN[name], tokens, trusted=False).spots.tolist()


def test_without_words_each_selector_keeps_the_tokens_of_the_one_it_falls_back_to() -> None:
    template = torch.rand(3, 25, generator=torch.Generator().manual_seed(1))
    without = asked(LanguageAttention(template, template.expand(2, 3, 25), 0), None)
    assert kept("llm-attention", without) == kept("flashvlm-2", without)
    assert kept("sparsevlm-boundary", without) == kept("vispruner", without)
    # FastV needs the last row only, which is the template's.
    assert kept("fastv-boundary", without) == fastv_boundary(template, 6).tolist()


def test_without_attention_each_selector_falls_back() -> None:
    without = asked(None, torch.randn(2, 4))
    assert kept("llm-attention", without) == kept("flashvlm-2", without)
    assert kept("fastv-boundary", without) == kept("vispruner", without)
    assert kept("sparsevlm-boundary", without) == kept("vispruner", without)


def test_attention_to_some_tokens_is_a_part_of_the_columns() -> None:
    mean = torch.arange(10.0).view(2, 5)
    some = LanguageAttention(mean, torch.stack([-mean, mean]), 1).of(slice(1, 3))
    assert some.mean.tolist() == [[1, 2], [6, 7]]
    assert some.read.tolist() == [[[-1, -2], [-6, -7]], [[1, 2], [6, 7]]]
    assert some.words == 1


def test_a_checkerboard_has_half_of_the_tokens_whatever_is_missing() -> None:
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    assert checkerboard(grid).tolist() == [0, 2, 5, 7, 8, 10]
    assert checkerboard(grid[:1]).tolist() == [0]
    assert checkerboard(grid[1:2]).tolist() == [0]
    # Two of the black tokens are missing: a white one takes their place.
    padded = grid[[0, 1, 3, 4, 6, 7, 8, 9]]
    assert padded.sum(dim=1).remainder(2).tolist() == [0, 1, 1, 1, 1, 0, 0, 1]
    assert checkerboard(padded).tolist() == [0, 1, 5, 6]
