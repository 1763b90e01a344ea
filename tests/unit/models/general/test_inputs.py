# SPDX-License-Identifier: Apache-2.0
"""A call's inputs are split into items and put together as vLLM does."""

from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

from flashvlm_vllm.models.general.inputs import layout_of, split, together

FIELDS = {
    "grid": MultiModalFieldConfig.batched("image"),
    "pixels": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([2, 3, 1])),
    "wide": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([1, 2, 2]), dim=1),
    "uneven": MultiModalFieldConfig.batched("image"),
    "all": MultiModalFieldConfig.shared("image", 3),
}


def items() -> Any:
    given = {
        "grid": torch.arange(9).view(3, 3),
        "pixels": torch.arange(24.0).view(6, 4),
        "wide": torch.arange(10.0).view(2, 5),
        "uneven": [torch.arange(2.0), torch.arange(5.0), torch.arange(1.0)],
        "all": torch.tensor([4.0]),
    }
    return MultiModalKwargsItems.from_hf_inputs(given, FIELDS)["image"]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("chosen", [[0], [1, 2], [2, 0], [0, 1, 2]])
def test_some_items_of_a_call_are_as_if_the_others_were_not_there(chosen: list[int]) -> None:
    every = items()
    call = dict(MultiModalKwargsItems({"image": every}).get_data())
    apart = split(call, [layout_of(each) for each in every])
    assert [each.keys() for each in apart] == [each.keys() for each in every]
    expected = dict(
        MultiModalKwargsItems({"image": [every[number] for number in chosen]}).get_data()
    )
    found = together([apart[number] for number in chosen])
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
