# SPDX-License-Identifier: Apache-2.0
"""Padded batches select the same tokens as single images; used on CUDA, tested here on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvlm_vllm.selection import ABLATIONS, VIDEO, SelectionConfig, select_visual_tokens
from flashvlm_vllm.selection import batch as batch_module
from flashvlm_vllm.selection.batch import Item, select_batched
from flashvlm_vllm.selection.padding import Padding, pad
from flashvlm_vllm.selection.scaling import min_max
from flashvlm_vllm.selection.scores import score

from .conftest import make_image

CONFIGS = {
    "published": SelectionConfig(),
    "small_rounds": SelectionConfig(removed_per_round=3, important_fraction=0.25),
    "gates_cancel": SelectionConfig(query_gate="normalized_first"),
    "important_only": SelectionConfig(important_fraction=1.0),
    "nearly_important_only": SelectionConfig(important_fraction=1 - 2**-53),
    "video": replace(VIDEO, block_length=8),
    **ABLATIONS,
}


def alone(item: Item, config: SelectionConfig) -> Tensor:
    return select_visual_tokens(
        item.image_features,
        item.saliency,
        item.text_embeds,
        item.budget,
        item.diversity_features,
        config,
    )


def signs(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def exact_item(
    count: int, words: int | None, budget: int, seed: int, *, seen: bool, own: bool
) -> Item:
    """Entries of +-1 in 16 or 64 dimensions: norms and cosines are exact, and ties are frequent.

    At most one word, whose weight is 1, and no saliency with it: otherwise scores are equal only
    up to the rounding of a softmax.
    """
    seen = seen and not words
    random = torch.Generator().manual_seed(seed)
    return Item(
        signs(count, 16, generator=random),
        torch.randint(0, 4, (count,), generator=random).float() if seen else None,
        None if words is None else signs(words, 16, generator=random),
        budget,
        signs(count, 64, generator=random) if own else None,
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(1, 48), st.sampled_from([None, 0, 1]), st.integers(1, 50), st.booleans()
        ),
        min_size=1,
        max_size=7,
    ),
    seed=st.integers(0, 10_000),
    own=st.booleans(),
    name=st.sampled_from(sorted(set(CONFIGS) - {"without_text_sharpening"})),
)
def test_exact_inputs_with_many_ties_select_the_same_tokens_batched(
    shapes: list[tuple[int, int | None, int, bool]], seed: int, own: bool, name: str
) -> None:
    items = [
        exact_item(count, words, budget, seed + number, seen=seen, own=own)
        for number, (count, words, budget, seen) in enumerate(shapes)
    ]
    # The gate of eq 3 divides by a norm plus epsilon, which is not exact.
    config = replace(CONFIGS[name], query_gate="none")
    together = select_batched(items, config)
    assert [kept.tolist() for kept in together] == [alone(item, config).tolist() for item in items]


def ragged_items() -> list[Item]:
    sizes = [(60, 11), (75, 24), (61, 60), (1, 1), (200, 7), (64, 99), (70, 33)]
    items = []
    for seed, (count, budget) in enumerate(sizes):
        image = make_image(count, seed, words=2 + seed)
        items.append(Item(image.features, image.saliency, image.text, budget, image.diversity))
    items[1] = replace(items[1], saliency=None)
    items[4] = replace(items[4], text_embeds=None)
    items[6] = replace(items[6], text_embeds=items[6].image_features[:0])
    return items


@pytest.mark.parametrize("name", CONFIGS)
def test_images_of_different_sizes_select_the_same_tokens_batched(name: str) -> None:
    items = ragged_items()
    together = select_batched(items, CONFIGS[name])
    for item, kept in zip(items, together, strict=True):
        assert kept.tolist() == alone(item, CONFIGS[name]).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_scores_equal_single_scores(name: str) -> None:
    items = ragged_items()
    counts = torch.tensor([item.count for item in items])
    words = [0 if item.text_embeds is None else len(item.text_embeds) for item in items]
    tokens, word_padding = Padding.of(counts, 200), Padding.of(torch.tensor(words), max(words))
    none = items[0].image_features[:0]
    batched = score(
        pad([item.image_features for item in items], tokens),
        pad([torch.zeros(i.count) if i.saliency is None else i.saliency for i in items], tokens),
        pad([none if i.text_embeds is None else i.text_embeds for i in items], word_padding),
        CONFIGS[name],
        tokens,
        word_padding,
    )
    for row, item in zip(batched, items, strict=True):
        single = score(item.image_features, item.saliency, item.text_embeds, CONFIGS[name])
        torch.testing.assert_close(row[: item.count], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["image_features", "saliency", "text_embeds", "diversity"])
@pytest.mark.parametrize("is_all", [False, True])
def test_a_non_finite_image_does_not_affect_the_other_images(
    field: str, value: float, is_all: bool
) -> None:
    field = "diversity_features" if field == "diversity" else field
    items = ragged_items()
    intact = select_batched(items, SelectionConfig())
    broken = getattr(items[2], field).clone()
    (broken if is_all else broken[:1]).fill_(value)
    items[2] = replace(items[2], **{field: broken})
    together = select_batched(items, SelectionConfig())
    for number, kept in enumerate(together):
        if number == 2:
            assert kept.tolist() == alone(items[2], SelectionConfig()).tolist()
        else:
            assert torch.equal(kept, intact[number])


def test_images_of_other_widths_and_dtypes_are_selected_correctly() -> None:
    items = ragged_items()
    items[0] = replace(items[0], diversity_features=None)
    items[2] = Item(torch.randn(40, 7), None, torch.randn(2, 7), 9, torch.randn(40, 5))
    items[5] = replace(items[5], image_features=items[5].image_features.double())
    together = select_batched(items, SelectionConfig())
    for item, kept in zip(items, together, strict=True):
        assert kept.tolist() == alone(item, SelectionConfig()).tolist()


def test_a_batch_is_split_to_limit_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [exact_item(40 + n, 1, 9, n, seen=True, own=False) for n in range(6)]
    whole = [group for group in batch_module._groups(items, range(6))]
    assert whole == [[0, 1, 2, 3, 4, 5]]
    monkeypatch.setattr(batch_module, "WORKSPACE", 2 * batch_module._bytes(items[5]))
    assert list(batch_module._groups(items, range(6))) == [[0, 1], [2, 3], [4, 5]]
    expected = [alone(item, SelectionConfig()).tolist() for item in items]
    assert [kept.tolist() for kept in select_batched(items, SelectionConfig())] == expected


def test_images_of_very_different_lengths_are_not_padded_together() -> None:
    items = [exact_item(count, 1, 3, 0, seen=True, own=False) for count in (40, 400, 49, 51)]
    assert list(batch_module._groups(items, range(4))) == [[0, 2], [3], [1]]


@pytest.mark.parametrize("name", ["published", "video"])
def test_no_value_is_read_back_from_the_device(name: str) -> None:
    """Meta tensors have no values: reading one, even to decide on a shape, raises."""

    def without_values(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("meta")

    items = [
        replace(
            item,
            image_features=item.image_features.to("meta"),
            saliency=without_values(item.saliency),
            text_embeds=without_values(item.text_embeds),
            diversity_features=without_values(item.diversity_features),
        )
        for item in ragged_items()
    ]
    together = select_batched(items, CONFIGS[name])
    assert [kept.shape[0] for kept in together] == [11, 24, 60, 1, 7, 64, 33]
    assert all(kept.device.type == "meta" for kept in together)


def test_an_empty_batch_returns_an_empty_list() -> None:
    assert select_batched([], SelectionConfig()) == []


def test_padding_does_not_affect_min_max() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 9.0], [5.0, math.nan, 7.0, -4.0]])
    scaled = min_max(values, 0.5, Padding.of(torch.tensor([3, 3]), 4))
    torch.testing.assert_close(scaled, torch.tensor([[0.8, 0, 0.4, 0], [0, 0, 0.8, 0]]))
