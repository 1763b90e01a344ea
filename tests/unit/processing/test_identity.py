# SPDX-License-Identifier: Apache-2.0
"""Identities of pruned items change with everything that the kept tokens depend on, and no more."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vllm")

from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.gaps import gap_of
from flashvlm_vllm.ipc.item_fields import TurnIds
from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.processing.identity import (
    _SELECTION_VERSION,
    PlannedInputs,
    selection_key,
)
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems
from flashvlm_vllm.processing.processor import VisualTokenProcessor
from flashvlm_vllm.request.budget import TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions


def plan(selector: str = "flashvlm", budget: int = 64) -> ItemPlan:
    made = ItemPlan.of(TokenCount(576, 576), Allotment(budget, selector), VisualPositions.KEPT, 1)
    made.question_ids = (5, 6)
    return made


def test_the_turn_is_part_of_the_identity() -> None:
    turns = [
        TurnIds(),
        TurnIds((1,), (2,)),
        TurnIds((1, 2)),
        TurnIds((), (1, 2)),
        TurnIds((1, 2), (3,)),
    ]
    keys = {selection_key(replace(plan("llm-attention"), turn_ids=each), "item") for each in turns}
    assert len(keys) == len(turns)


def test_without_a_turn_the_identity_is_that_of_earlier_versions_of_the_plugin() -> None:
    factors = [_SELECTION_VERSION, "item", 64, "flashvlm", [5, 6]]
    expected = hashlib.sha256(json.dumps(factors).encode()).digest()
    assert selection_key(plan(), "item") == expected


def test_budget_selector_question_and_item_are_part_of_the_identity() -> None:
    others = [
        (plan(budget=65), "item"),
        (plan("flashvlm-2"), "item"),
        (replace(plan(), question_ids=(5,)), "item"),
        (plan(), "another"),
    ]
    assert len({selection_key(*each) for each in [(plan(), "item"), *others]}) == 5


class HashesAgain(BaseMultiModalProcessor):
    """A processor that derives identities from vLLM's, as some do from vLLM 0.33."""

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        names = inputs.get_mm_hashes("model", "sha256")["image"]
        return {"image": [f"again-{name}" for name in names]}


class Processor(VisualTokenProcessor, HashesAgain):
    """As made for a model; only its identities are asked here."""

    __abstractmethods__ = frozenset()

    def __init__(self) -> None:
        pass


def test_a_processor_that_hashes_again_does_not_hide_the_gap_of_a_pruned_item() -> None:
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    items = MultiModalDataItems({"image": ImageProcessorItems(images)})
    stock = ProcessorInputs([1], items)
    pruned = plan()
    whole = ItemPlan.of(TokenCount(576, 576), Allotment(None, None), VisualPositions.KEPT, 1)
    planned = PlannedInputs.of(stock, PlannedItems(items, {"image": [pruned, whole]}))

    expected = Processor()._get_mm_hashes(stock)["image"]
    first, second = Processor()._get_mm_hashes(planned)["image"]
    assert expected[0].startswith("again-") and second == expected[1]
    assert gap_of(second) is None
    gap = gap_of(first)
    assert gap is not None and gap.full == 576 - 64
    assert selection_key(pruned, expected[0]).hex() in first
