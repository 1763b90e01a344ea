# SPDX-License-Identifier: Apache-2.0
"""Identities of pruned items change with everything that the kept tokens depend on, and no more."""

import hashlib
import json
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from flashvlm_vllm.ipc.item_fields import TurnIds
from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.processing.identity import _SELECTION_VERSION, selection_key
from flashvlm_vllm.processing.plan import ItemPlan
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
