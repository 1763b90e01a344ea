# SPDX-License-Identifier: Apache-2.0
"""Identities of pruned items in vLLM's caches and in those of this plugin."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.gaps import item_name, may_be_mistaken
from flashvlm_vllm.ipc.item_fields import CLOSED
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems

_SELECTION_VERSION = 6
"""Part of every pruned item's identity. Increase it with every change after which the same request
would keep other tokens: external KV stores outlive a process."""


def selection_key(plan: ItemPlan, item: str) -> bytes:
    """Return the identity of an item with its budget, selector and question, 32 bytes.

    The kept tokens depend on the budget, the selector and the question, so a cache keyed by the
    pixels alone would return the tokens selected for another question. The positions of kept tokens
    do not affect which are kept; `ipc.gaps.item_name` adds them.

    Args:
        plan: plan of the item.
        item: the item's identity without pruning.

    """
    asked = [plan.allotment.budget, plan.allotment.selector, plan.question_ids]
    # Selectors that do not use the language model keep their identities.
    turn = [plan.turn_ids] if any(plan.turn_ids) else []
    factors = json.dumps([_SELECTION_VERSION, item, *asked, *turn])
    return hashlib.sha256(factors.encode()).digest()


def item_key(item: str) -> bytes:
    """Return an item's identity without budget, selector and question, 32 bytes."""
    return hashlib.sha256(item.encode()).digest()


def without_forged_names(inputs: ProcessorInputs) -> ProcessorInputs:
    """Replace uuids of clients that could be taken for names of pruned items.

    vLLM uses an item's uuid as its name, and this plugin reads from the name of a pruned item how
    many tokens were dropped. Equal uuids stay equal.
    """
    given = inputs.mm_uuid_items or {}
    forged = [each for own in given.values() for each in own if each and may_be_mistaken(each)]
    if not forged:
        return inputs
    others = {each: hashlib.sha256(each.encode()).hexdigest() for each in forged}
    uuids: dict[str, Any] = {
        name: [others.get(each or "", each) for each in own] for name, own in given.items()
    }
    return replace(inputs, mm_uuid_items=uuids)


class PlannedInputs(ProcessorInputs):
    """Processor inputs of a prompt with planned items."""

    @classmethod
    def of(cls, inputs: ProcessorInputs, items: PlannedItems) -> "PlannedInputs":
        """Return a copy of ``inputs`` with planned items in place of its own."""
        return cls(**{**_given(inputs), "mm_data_items": items})

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Return vLLM's identities for items that are kept whole, derived ones for pruned items.

        vLLM up to 0.32 asks here.
        """
        return self.planned_names(super().get_mm_hashes(*args, **kwargs))

    def unplanned(self) -> ProcessorInputs:
        """Return a copy with vLLM's identities."""
        return ProcessorInputs(**_given(self))

    def planned_names(self, stock: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Return the identities of items from vLLM's: derived ones for those that are pruned."""
        hashes = dict(stock)
        items = self.mm_data_items
        if not isinstance(items, PlannedItems):
            return hashes
        for modality, plans in items.plans.items():
            if modality not in hashes:
                continue
            names = [
                _name(own, name) if own.is_pruned else name
                for own, name in zip(plans, hashes[modality], strict=True)
            ]
            if items.explain_id is not None:
                # The explain id prevents cache hits without changing which tokens are kept.
                names = [f"{name}-{items.explain_id}-{number}" for number, name in enumerate(names)]
            hashes[modality] = names
        return hashes


def _given(inputs: ProcessorInputs) -> dict[str, Any]:
    return {each.name: getattr(inputs, each.name) for each in fields(ProcessorInputs)}


def _name(item: ItemPlan, stock: str) -> str:
    gap = None if item.gap == CLOSED else item.gap
    return item_name(selection_key(item, stock), gap, item.dropped)
