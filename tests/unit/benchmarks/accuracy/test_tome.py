# SPDX-License-Identifier: Apache-2.0
"""ToMe inside a CLIP tower: schedules, counts, merges, and equality with the stock tower."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.accuracy.inside import tome as module
from benchmarks.accuracy.inside.tome import (
    Tokens,
    attend,
    merge,
    merge_schedule,
    merged_tokens,
    tome,
)
from small_vlm.architecture import build_model, build_tokenizer, tower_of

SIDE = 6
PATCHES = SIDE * SIDE


def tiny_tower(layers: int = 4) -> CLIPVisionModel:
    """Weights are large, so that attention is far from uniform."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=7 * SIDE,
        patch_size=7,
        initializer_range=0.5,
        initializer_factor=8.0,
    )
    return CLIPVisionModel(config).eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 7 * SIDE, 7 * SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stock(tower: Any, pixels: Tensor, feature_layer: int = -2) -> Tensor:
    states: Tensor = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    return states[:, 1:]


def arrival(tower: Any) -> list[int]:
    """Record how many tokens, CLS included, reach the MLP of each layer that is run from now on."""
    counts: list[int] = []
    for layer in tower.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[-2]))
    return counts


@pytest.mark.parametrize(
    ("budget", "schedule"),
    [
        (192, [17] * 16 + [16] * 7),
        (128, [20] * 11 + [19] * 12),
        (64, [23] * 6 + [22] * 17),
        (32, [24] * 15 + [23] * 8),
    ],
)
def test_schedules_of_clip_large(budget: int, schedule: list[int]) -> None:
    assert merge_schedule(576, budget, 23) == schedule
    assert sum(schedule) == 576 - budget


def test_layers_with_too_few_tokens_leave_merges_to_earlier_layers() -> None:
    assert merge_schedule(576, 64, 4) == [160, 160, 128, 64]
    assert merge_schedule(576, 36, 4) == [288, 144, 72, 36]
    with pytest.raises(ValueError, match="allowed: 36 to 576"):
        merge_schedule(576, 35, 4)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("patches", [1, 2, 3, 7, 12])
def test_the_maximum_of_a_schedule_is_minimal(patches: int, layers: int) -> None:
    possible: dict[int, int] = {}  # the smallest maximum, by the number of tokens left
    for merges in itertools.product(range(patches // 2 + 1), repeat=layers):
        left = patches
        for number in merges:
            left = left - number if number <= left // 2 else 0
        if left:
            possible[left] = min(max(merges), possible.get(left, patches))
    for budget in range(1, patches + 1):
        if budget not in possible:
            with pytest.raises(ValueError, match="budget is"):
                merge_schedule(patches, budget, layers)
            continue
        merges = tuple(merge_schedule(patches, budget, layers))
        assert len(merges) == layers
        assert sum(merges) == patches - budget
        assert max(merges) == possible[budget]


@pytest.mark.parametrize("arguments", [(0, 1, 1), (4, 0, 1), (4, 5, 1), (4, 4, 0)])
def test_an_invalid_schedule_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        merge_schedule(*arguments)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
def test_a_budget_of_all_tokens_equals_the_stock_tower(feature_layer: int) -> None:
    tower, pixels = tiny_tower(), pictures()
    expected = stock(tower, pixels, feature_layer)
    for budget in (PATCHES, PATCHES + 1):
        given = tome(tower, pixels, budget, feature_layer=feature_layer)
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


def test_a_budget_of_all_tokens_equals_the_small_vlm() -> None:
    model = build_model(build_tokenizer(), 0).eval()
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = model.model.get_image_features(pixels).pooler_output[0]
        projected = model.model.multi_modal_projector(tome(tower_of(model), pixels, 576))[0]
    torch.testing.assert_close(projected, expected, atol=1e-4, rtol=0)
    counts = arrival(tower_of(model))
    assert tome(model.model.vision_tower, pixels, 64).shape == (1, 64, 128)
    assert counts == [417, 257, 129, 65]


@pytest.mark.parametrize("budget", [6, 18, 35])
def test_token_counts_per_layer_follow_the_schedule(budget: int) -> None:
    tower = tiny_tower()
    counts = arrival(tower)
    assert tome(tower, pictures(1), budget).shape == (1, budget, 32)
    merges = merge_schedule(PATCHES, budget, 3)
    assert counts == [PATCHES + 1 - sum(merges[: layer + 1]) for layer in range(3)]


@pytest.mark.parametrize("budget", [5, 12, 29, 36])
def test_every_patch_is_in_exactly_one_token(budget: int) -> None:
    tower = tiny_tower()
    tokens = merged_tokens(tower, tower.encoder.layers[:-1], pictures(1), budget)
    assert tokens.sizes.sum() == PATCHES + 1
    assert tokens.sizes.min() >= 1
    assert (tokens.sizes[0], tokens.first[0]) == (1, 0)  # CLS stays first and is not merged
    assert tokens.first.unique().shape == tokens.sizes.shape == (budget + 1,)


@torch.no_grad()
def test_attention_with_all_sizes_one_equals_the_stock_layer() -> None:
    attention = tiny_tower().encoder.layers[0].self_attn
    features = torch.randn(11, 32)
    attended, keys = attend(attention, features, torch.ones(11))
    torch.testing.assert_close(attended, attention(features[None])[0][0])
    heads = attention.k_proj(features).split(attention.head_dim, dim=1)
    assert len(heads) == 4
    torch.testing.assert_close(keys, sum(heads) / 4)


def test_merging_hand_computed_example() -> None:
    features = torch.tensor([[9.0], [1.0], [4.0], [2.0], [8.0], [3.0], [5.0]])
    tokens = Tokens(
        features, torch.tensor([1.0, 1, 3, 2, 1, 1, 1]), torch.tensor([0, 9, 4, 5, 2, 7, 3])
    )
    # CLS equals place 1. Place 2 is closest to 3, place 4 is closer to 3, 6 is closest to 5.
    degrees = torch.tensor([0.0, 0, 70, 90, 100, 200, 201]).deg2rad()
    keys = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    once = merge(tokens, keys, 1)
    assert once.features[:, 0].tolist() == [9, 4, 8, 1, 2, 4]
    assert once.sizes.tolist() == [1, 3, 1, 1, 2, 2]
    assert once.first.tolist() == [0, 4, 2, 9, 5, 3]
    thrice = merge(tokens, 5 * keys, 3)  # cosines: lengths are ignored
    torch.testing.assert_close(thrice.features[:, 0], torch.tensor([9.0, 1, 24 / 6, 4]))
    assert thrice.sizes.tolist() == [1, 1, 6, 2]
    assert thrice.first.tolist() == [0, 9, 2, 3]
    assert merge(tokens, keys, 0) is tokens


def test_equal_similarities_merge_the_first_tokens() -> None:
    count = 9
    tokens = Tokens(torch.randn(count, 3), torch.ones(count), torch.arange(count))
    twice = merge(tokens, torch.ones(count, 2), 2)
    assert twice.first.tolist() == [0, 6, 8, 1, 3, 5, 7]
    assert twice.sizes.tolist() == [1, 1, 1, 3, 1, 1, 1]


def doubled(tower: Any) -> Tensor:
    """Return a picture in which every second patch equals the one before it, position included."""
    torch.nn.init.zeros_(tower.embeddings.position_embedding.weight)
    patches = pictures(1).unflatten(3, (SIDE, 7))
    patches[:, :, :, 1::2] = patches[:, :, :, ::2]
    return patches.flatten(3)


def test_duplicates_are_merged() -> None:
    tower = tiny_tower(layers=2)
    pixels = doubled(tower)
    tokens = merged_tokens(tower, tower.encoder.layers[:-1], pixels, PATCHES // 2)
    assert tokens.sizes.tolist() == [1.0] + [2.0] * (PATCHES // 2)
    assert tokens.first.tolist() == [0, *range(1, PATCHES, 2)]


def test_a_merged_token_is_weighted_by_its_number_of_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = tiny_tower()
    pixels = doubled(tower)
    monkeypatch.setattr(module, "merge_schedule", lambda *_: [PATCHES // 2, 0, 0])
    # Merged duplicates do not change, and attention to both is twice the attention to one.
    expected = stock(tower, pixels)[:, ::2]
    given = tome(tower, pixels, PATCHES // 2)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [7, 20])
def test_the_result_is_sorted_by_the_first_patch_of_each_token(budget: int) -> None:
    tower, pixels = tiny_tower(), pictures(1)
    tokens = merged_tokens(tower, tower.encoder.layers[:-1], pixels, budget)
    assert tokens.first.tolist() != sorted(tokens.first.tolist())
    by_first = dict(zip(tokens.first.tolist(), tokens.features, strict=True))
    expected = torch.stack([by_first[first] for first in sorted(by_first)[1:]])
    assert torch.equal(tome(tower, pixels, budget)[0], expected)


@pytest.mark.parametrize("budget", [9, 30])
def test_a_picture_gives_the_same_result_in_any_batch(budget: int) -> None:
    tower, pixels = tiny_tower(), pictures(3)
    together = tome(tower, pixels, budget)
    alone = [tome(tower, picture[None], budget)[0] for picture in pixels]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.allclose(together[0], together[1])


def test_the_result_has_the_dtype_of_the_tower() -> None:
    tower = tiny_tower().to(torch.bfloat16)
    given = tome(tower, pictures(1), 20)
    assert given.dtype == torch.bfloat16
    assert torch.isfinite(given).all()


def test_an_unreachable_budget_is_refused() -> None:
    for budget in (0, 4):  # 36 patches, halved in three layers, leave 5
        with pytest.raises(ValueError, match="budget is"):
            tome(tiny_tower(), pictures(1), budget)
    with pytest.raises(TypeError, match="budget is"):
        tome(tiny_tower(), pictures(1), 20.0)  # type: ignore[arg-type]
