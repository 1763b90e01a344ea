# SPDX-License-Identifier: Apache-2.0
"""What is packed for the worker is unpacked unchanged, also after vLLM split and batched it."""

import pytest
import torch

pytest.importorskip("vllm")

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

from flashvlm_vllm.ipc.item_fields import (
    NO_TURN,
    ItemRequests,
    TurnIds,
    field_names,
    selection_key_of,
)


def requests(modality: str) -> ItemRequests:
    return ItemRequests(
        keep=[3, 700],
        question_ids=[torch.tensor([5, 6, 7]), torch.tensor([], dtype=torch.int64)],
        selection_keys=[b"a" * 32, b"b" * 32],
        item_keys=[b"c" * 32, b"d" * 32],
        selectors=["llm-attention", "uniform"],
        gaps=[9, -1],
        turns=[TurnIds((1, 2), (8,)), NO_TURN],
        modality=modality,
    )


def assert_equal(found: ItemRequests | None, expected: ItemRequests) -> None:
    assert found is not None
    ids = [each.tolist() for each in found.question_ids]
    assert ids == [each.tolist() for each in expected.question_ids]
    for name in ("keep", "selection_keys", "item_keys", "selectors", "gaps", "turns", "modality"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("modality", ["image", "video"])
def test_requests_survive_the_way_through_vllm(modality: str) -> None:
    given = requests(modality)
    packed = given.packed()
    fields = {name: MultiModalFieldConfig.batched(modality) for name in packed}
    assert set(fields) == set(field_names(packed, modality))
    items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(packed), fields)[modality]
    keys = [selection_key_of(item, modality) for item in items]
    assert keys == [each.hex() for each in given.selection_keys]
    for row, item in enumerate(items):
        alone = {name: [element.data] for name, element in item.items()}
        assert_equal(ItemRequests.pop_from(alone), given[row : row + 1])
        assert not alone


def test_the_turn_of_an_item_without_one_is_empty() -> None:
    given = requests("image")[1:]
    assert_equal(ItemRequests.pop_from(given.packed()), given)
    assert given.turns == [NO_TURN]
