# SPDX-License-Identifier: Apache-2.0
"""SparseVLM inside a Llama: the published counts, and each step against plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.inside.sparsevlm import (
    average_tokens,
    merged,
    prune,
    raters,
    recycled,
    schedule,
    sparsevlm,
    visual_tokens,
)
from small_vlm.architecture import build_model, build_tokenizer

from .test_fastv import IMAGE, LAYERS, LENGTH, PROMPT, embeddings, entries, stock, tiny_llama

KEEP = {0: 12, 1: 7, 2: 2}


def raters_by_loops(visual: Tensor, text: Tensor) -> list[int]:
    rates = [0.0] * len(text)
    for token in visual.tolist():
        weights = [math.exp(sum(map(float.__mul__, token, word))) for word in text.tolist()]
        for place, weight in enumerate(weights):
            rates[place] += weight / sum(weights) / len(visual)
    return [place for place, rate in enumerate(rates) if rate > sum(rates) / len(rates)]


def merged_by_loops(tokens: Tensor, centres: int) -> Tensor:
    points, width = tokens.tolist(), tokens.shape[1]
    every = range(len(points))
    far = [[math.dist(points[a], points[b]) / math.sqrt(width) for b in every] for a in every]
    density = [math.exp(-sum(d * d for d in sorted(far[a])[:centres]) / centres) for a in every]
    peak = []
    for a in every:
        to_denser = [far[a][b] for b in every if (density[b], -b) > (density[a], -a)]
        peak.append(density[a] * min(to_denser, default=max(map(max, far))))
    chosen = sorted(sorted(every, key=lambda a: -peak[a])[:centres])
    clusters: dict[int, list[int]] = {centre: [] for centre in chosen}
    for a in every:
        nearest = a if a in chosen else min(chosen, key=lambda centre: far[a][centre])
        clusters[nearest].append(a)
    return torch.stack([tokens[members].mean(dim=0) for members in clusters.values()])


@torch.no_grad()
def by_stages(embeds: Tensor, keep: Mapping[int, int], prompt: int) -> Tensor:
    """Run the stock model split after each pruning layer; positions start at zero in every part."""
    model = tiny_llama()
    start, stop = IMAGE.start, IMAGE.stop
    words = raters_by_loops(embeds[start:stop], embeds[stop:prompt])
    assert 0 < len(words) < prompt - stop
    hidden, done = embeds, 0
    for layer in sorted({*keep, LAYERS - 1}):
        piece = copy.deepcopy(model.model)
        piece.layers = piece.layers[done : layer + 1]
        piece.config.num_hidden_layers = len(piece.layers)
        if layer < LAYERS - 1:
            piece.norm = nn.Identity()
        output = piece(inputs_embeds=hidden[None], output_attentions=True, use_cache=False)
        hidden, done = output.last_hidden_state[0], layer + 1
        if layer in keep:
            heads = output.attentions[-1][0]
            score = [
                sum(float(head[stop + word, place]) for head in heads for word in words)
                for place in range(start, stop)
            ]
            ranking = sorted(range(stop - start), key=lambda place: -score[place])
            left, gone = ranking[: keep[layer]], ranking[keep[layer] :]
            back = sorted(gone[: math.floor(0.3 * len(gone)) + 1])
            image = hidden[start:stop]
            again = merged_by_loops(image[back], math.floor(len(back) / 10) + 1)
            hidden = torch.cat([hidden[:start], image[sorted(left)], again, hidden[stop:]])
            stop = start + len(left) + len(again)
    logits: Tensor = model.lm_head(hidden[-1])
    return logits


@pytest.mark.parametrize("prompt", [PROMPT, None])
@pytest.mark.parametrize("keep", [KEEP, {1: 19}, {0: 1}, {2: 5, 0: 8}, {1: 1, 2: 1}])
def test_the_method_equals_parts_of_the_stock_model(
    keep: dict[int, int], prompt: int | None
) -> None:
    embeds = embeddings() / 3  # small, so that several words are raters
    given = sparsevlm(tiny_llama(), embeds, IMAGE, keep, prompt=prompt)
    expected = by_stages(embeds, keep, prompt or LENGTH)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(given, stock(tiny_llama(), embeds), atol=1e-3)


@pytest.mark.parametrize("keep", [{}, {0: 20}, {0: 21, 1: 20, 3: 999}])
def test_a_budget_of_all_tokens_equals_the_stock_model(keep: dict[int, int]) -> None:
    model, embeds = tiny_llama(), embeddings()
    given = sparsevlm(model, embeds, IMAGE, keep, prompt=PROMPT)
    torch.testing.assert_close(given, stock(model, embeds), atol=1e-4, rtol=0)


def test_a_budget_of_all_tokens_equals_the_small_vlm() -> None:
    model = build_model(build_tokenizer(), 0).eval()
    embeds = torch.randn(40, model.config.text_config.hidden_size)
    given = sparsevlm(model, embeds, slice(2, 30), {0: 28})
    torch.testing.assert_close(given, stock(model, embeds), atol=1e-4, rtol=0)


def wide() -> tuple[Tensor, slice]:
    """Return an image large enough for several merged tokens."""
    return embeddings(150), slice(3, 143)


@pytest.mark.parametrize("keep", [{0: 20, 1: 11, 2: 2}, {2: 1}])
def test_token_counts_per_layer_are_as_computed(keep: dict[int, int]) -> None:
    model = tiny_llama()
    seen = entries(model)
    sparsevlm(model, *wide(), keep)
    counts = visual_tokens(LAYERS, 140, keep)
    assert [len(hidden) - 10 for hidden in seen] == counts[:-1]
    # 120 are dropped, 37 of them merged into 4; then 13, 4 into 1; then 10, 4 into 1.
    if 0 in keep:
        assert counts == [140, 24, 12, 3, 3]


def test_generated_tokens_do_not_change_the_kept_tokens() -> None:
    model = tiny_llama()
    seen = entries(model)
    for length, seed in ((PROMPT, 2), (PROMPT + 1, 2), (LENGTH, 3)):
        embeds = torch.cat([embeddings(PROMPT), embeddings(length - PROMPT, seed)])
        sparsevlm(model, embeds, IMAGE, KEEP, prompt=PROMPT)
    first, *others = seen[LAYERS - 1 :: LAYERS]
    assert [len(hidden) - len(first) for hidden in others] == [1, 4]
    for hidden in others:
        torch.testing.assert_close(hidden[: len(first)], first, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_raters_are_the_words_above_the_mean(seed: int) -> None:
    visual, text = embeddings(20, seed) / 2, embeddings(9, 100 + seed) / 2
    assert raters(visual, text).tolist() == raters_by_loops(visual, text)


def test_raters_hand_computed_example() -> None:
    text = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert raters(torch.tensor([[2.0, 0.0]]), text).tolist() == [1]
    assert raters(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), text).tolist() == [1, 2]
    # Half of the image matches the first word; a quarter, which is the mean, matches the second.
    words = 100 * torch.eye(4)
    assert raters(words[[0, 0, 1, 2]], words).tolist() == [0]
    # With equal shares no word is above the mean.
    assert raters(torch.zeros(3, 2), text).tolist() == [0, 1, 2, 3]
    assert raters(torch.ones(3, 2), text[1:2]).tolist() == [0]


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (0, (0, 0)),
        (1, (1, 1)),
        (3, (1, 1)),
        (4, (2, 1)),
        (29, (9, 1)),
        (30, (10, 2)),
        (276, (83, 9)),
    ],
)
def test_number_of_recycled_and_merged_tokens(dropped: int, expected: tuple[int, int]) -> None:
    assert recycled(dropped) == expected


@pytest.mark.parametrize("count", [1, 2, 10, 31])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_equal_plain_loops(count: int, seed: int) -> None:
    tokens = embeddings(count, seed).double()
    for centres in {1, min(2, count), count // 10 + 1, count}:
        expected = merged_by_loops(tokens, centres).float()
        torch.testing.assert_close(merged(tokens, centres), expected)


def test_clusters_hand_computed_example() -> None:
    tokens = torch.tensor([[0.0], [10.0], [1.0], [11.0], [2.0]])
    # Densities are equal, so the first is a peak, and the second is far from it.
    assert merged(tokens, 2)[:, 0].tolist() == [1, 10.5]
    assert merged(tokens, 1).item() == pytest.approx(24 / 5)
    assert torch.equal(merged(tokens, 5), tokens)


def test_equal_tokens_leave_no_cluster_empty() -> None:
    for centres in range(1, 8):
        assert torch.equal(merged(torch.ones(7, 3), centres), torch.ones(centres, 3))


def test_pruning_hand_computed_example() -> None:
    tokens = torch.arange(9.0)[:, None]
    score = torch.tensor([1.0, 8, 3, 8, 2, 9, 4, 4, 0])
    # 5 stays, and 1 as the first of two equals. Of seven others the best three (3, 6, 7) merge.
    assert prune(tokens, score, 2)[:, 0].tolist() == pytest.approx([1, 5, 16 / 3])
    assert prune(tokens, score, 8)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert prune(tokens.bfloat16(), score, 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keep", "left", "outputs", "inputs"),
    [
        ((300, 200, 110), (309, 204, 113), 192.03, 206.5),
        ((303, 110, 36), (312, 117, 39), 128.6, 145.4),
        ((238, 48, 26), (249, 55, 27), 96.9, 114.1),
        ((66, 30, 17), (82, 32, 18), 64.8, 82.3),
    ],
)
def test_average_token_counts_equal_the_reference_table(
    keep: tuple[int, ...], left: tuple[int, ...], outputs: float, inputs: float
) -> None:
    counts = dict(zip((2, 6, 15), keep, strict=True))
    through = visual_tokens(32, 576, counts)
    assert (through[3], through[7], through[16]) == left
    assert through == [576] * 3 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 17
    assert average_tokens(32, 576, counts) == pytest.approx(outputs, abs=0.05)
    assert average_tokens(32, 576, counts, of="inputs") == pytest.approx(inputs, abs=0.05)


def test_the_published_schedules_are_reproduced_within_the_budget() -> None:
    # The factor is slightly below 1, because the published ones cost 192.03, 128.6 and 64.8.
    for budget, counts in ((192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))):
        keep = schedule(32, 576, budget)
        assert tuple(keep) == (2, 6, 15)
        for given, published in zip(keep.values(), counts, strict=True):
            assert published - 4 <= given <= published


@pytest.mark.parametrize("layers", [4, 5, 12, 32, 40])
@pytest.mark.parametrize("patches", [50, 576])
def test_schedules_meet_the_budget_as_closely_as_possible(layers: int, patches: int) -> None:
    for budget in (patches // 4, patches // 3, patches // 2, patches - 1):
        keep = schedule(layers, patches, budget)
        places, counts = list(keep), list(keep.values())
        assert places == sorted(set(places))
        assert len(places) == 3
        assert places[0] >= 0
        assert places[-1] < layers - 1  # a layer processes the tokens left by the last pruning
        assert all(0 < count <= patches for count in counts)
        average = average_tokens(layers, patches, keep)
        assert budget - 3 < average <= budget
        more = {place: count + 1 for place, count in keep.items()}
        assert average_tokens(layers, patches, more) > budget


def test_schedules_of_the_small_vlm() -> None:
    assert schedule(4, 576, 576) == {0: 576, 1: 576, 2: 576}
    for budget in (192, 128, 64, 32, 16):
        keep = schedule(4, 576, budget)
        assert list(keep) == [0, 1, 2]
        assert budget - 1 <= average_tokens(4, 576, keep) <= budget


def test_a_budget_below_the_cost_of_the_first_layers_is_refused() -> None:
    assert average_tokens(32, 576, schedule(32, 576, 40)) == 40
    with pytest.raises(ValueError, match="budget is 32; allowed: at least 40"):
        schedule(32, 576, 32)
    with pytest.raises(ValueError, match="layers is 3"):
        schedule(3, 576, 64)
    with pytest.raises(ValueError, match="budget is 0"):
        schedule(4, 576, 0)


@pytest.mark.parametrize("keep", [{4: 3}, {-1: 3}, {0: 0}])
def test_counts_out_of_range_are_refused(keep: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        sparsevlm(tiny_llama(), embeddings(), IMAGE, keep)
    with pytest.raises(ValueError, match="allowed"):
        average_tokens(LAYERS, 20, keep)


def test_a_count_that_is_not_an_int_is_refused() -> None:
    keep: dict[int, Any] = {0: 3.0}
    with pytest.raises(TypeError, match=r"keep\[0\] is 3.0"):
        sparsevlm(tiny_llama(), embeddings(), IMAGE, keep)
