# SPDX-License-Identifier: Apache-2.0
"""How inputs of single items are put together, and divided over the items again by vLLM."""

from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

from flashvlm_vllm.processing.item_processor import fields_of

SIZES = torch.tensor([2, 3, 1])
FIELDS = {
    "grid": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    "pixels": MultiModalFieldConfig.flat_from_sizes("image", SIZES),
    "wide": MultiModalFieldConfig.flat_from_sizes("image", SIZES, dim=1),
    "nested": MultiModalFieldConfig.flat("image", [slice(0, 2), slice(2, 5), slice(5, 6)]),
    "all": MultiModalFieldConfig.shared("image", 3),
}


def items() -> Any:
    given = {
        "grid": torch.arange(9).view(3, 3),
        "pixels": torch.arange(24.0).view(6, 4),
        "wide": torch.arange(12.0).view(2, 6),
        "nested": [torch.arange(each) for each in range(1, 7)],
        "all": torch.tensor([4.0]),
    }
    return MultiModalKwargsItems.from_hf_inputs(given, FIELDS)["image"]


def test_items_that_were_put_together_are_divided_as_they_were() -> None:
    every = items()
    inputs = dict(MultiModalKwargsItems({"image": every}).get_data())
    again = MultiModalKwargsItems.from_hf_inputs(inputs, fields_of("image", every))["image"]  # type: ignore[arg-type]
    assert list(again) == list(every)
    for one, other in zip(again, every, strict=True):
        assert {name: elem.field.keep_on_cpu for name, elem in one.items()} == {
            name: elem.field.keep_on_cpu for name, elem in other.items()
        }
