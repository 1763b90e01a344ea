# SPDX-License-Identifier: Apache-2.0
"""Placeholders that a prompt already has are found by vLLM and shortened in place."""

import numpy as np
import pytest
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.multimodal.processing.processor import find_mm_placeholders

from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.processing.placeholders import (
    first_embeddings,
    shortened,
    shortened_in_prompt,
    unpruned,
)
from flashvlm_vllm.processing.plan import ItemPlan
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions

IMAGE, END, TEXT = 10, 13, 5
SIZES = (4, 3, 4)
"""Of the images; the placeholder of the second is the end of the first's."""


def content(number: int) -> PromptUpdateDetails:
    return PromptUpdateDetails.select_token_id([IMAGE] * SIZES[number] + [END], IMAGE)


def plan(number: int, budget: int | None) -> ItemPlan:
    count = TokenCount(SIZES[number], SIZES[number])
    return ItemPlan.of(count, Allotment(budget, "flashvlm"), VisualPositions.KEPT, 1)


@pytest.mark.parametrize("budgets", [(2, 1, 3), (None, 1, None), (1, None, None)])
def test_each_placeholder_is_shortened_to_its_own_budget(budgets: tuple[int | None, ...]) -> None:
    update = PromptReplacement("image", [], content)
    plans = [plan(number, budget) for number, budget in enumerate(budgets)]
    own = shortened(update, plans, first_embeddings)
    updates = {"image": [[own.resolve(number)] for number in range(len(SIZES))]}
    prompt = [each for number in range(len(SIZES)) for each in (TEXT, *content(number).full)]

    whole = unpruned(updates)
    assert whole is not None
    ids, placed = shortened_in_prompt(prompt, find_mm_placeholders(prompt, whole), updates)

    kept = [size if own is None else own for size, own in zip(SIZES, budgets, strict=True)]
    assert ids == [each for keep in kept for each in (TEXT, *[IMAGE] * keep, END)]
    assert [each.start_idx for each in placed["image"]] == [
        1 + sum(keep + 2 for keep in kept[:number]) for number in range(len(kept))
    ]
    assert [int(np.sum(each.is_embed.numpy())) for each in placed["image"]] == kept


def test_nothing_changes_where_no_item_is_pruned() -> None:
    update = PromptReplacement("image", [], content)
    own = shortened(update, [plan(0, None)], first_embeddings)
    assert unpruned({"image": [[own.resolve(0)]]}) is None


def test_a_prompt_with_one_token_per_image_is_updated_by_vllm() -> None:
    update = PromptReplacement("image", [IMAGE], content)
    own = shortened(update, [plan(0, 2)], first_embeddings).resolve(0)
    assert own.target == [IMAGE]
    assert unpruned({"image": [[own]]}) is None
