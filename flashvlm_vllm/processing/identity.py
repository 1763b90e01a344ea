# SPDX-License-Identifier: Apache-2.0
"""Cache identities: what vLLM's caches and this plugin's know a pruned item by."""

import hashlib
import json
from dataclasses import fields
from typing import Any

from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.gaps import item_name
from flashvlm_vllm.ipc.item_fields import CLOSED
from flashvlm_vllm.processing.plan import ItemPlan, PlannedItems, PromptPlan

_SELECTION_VERSION = 3
"""Part of every pruned item's identity. Raise it whenever the same request would keep other
tokens than before: external KV stores outlive a process."""


def selection_key(plan: PromptPlan, item: str) -> bytes:
    """Return an item's identity together with what is asked of it, 32 bytes.

    The kept tokens depend on the budget, the selector and the question, so a cache keyed by the
    pixels alone would answer one question with the tokens of another. The positions of kept tokens
    do not change which are kept; `ipc.gaps.item_name` adds them.

    Args:
        plan: of the prompt.
        item: the item's identity without pruning.

    """
    asked = [plan.budget, plan.selector, plan.question_ids]
    factors = json.dumps([_SELECTION_VERSION, item, *asked])
    return hashlib.sha256(factors.encode()).digest()


def item_key(item: str) -> bytes:
    """Return an item's identity, whatever is asked of it, as 32 bytes."""
    return hashlib.sha256(item.encode()).digest()


class PlannedInputs(ProcessorInputs):
    """Processor inputs of a prompt with a plan."""

    @classmethod
    def of(cls, inputs: ProcessorInputs, items: PlannedItems) -> "PlannedInputs":
        """Return inputs with planned items in place of theirs."""
        given = {each.name: getattr(inputs, each.name) for each in fields(ProcessorInputs)}
        return cls(**{**given, "mm_data_items": items})

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Return stock identities for what is kept whole, derived ones for what is pruned."""
        hashes = dict(super().get_mm_hashes(*args, **kwargs))
        items = self.mm_data_items
        if not isinstance(items, PlannedItems):
            return hashes
        plan = items.plan
        for modality, plans in items.plans.items():
            if modality not in hashes:
                continue
            names = [
                _name(plan, own, stock) if own.is_pruned else stock
                for own, stock in zip(plans, hashes[modality], strict=True)
            ]
            if plan.explain_id is not None:
                # No cache must answer it, and nothing of what is kept may change.
                names = [f"{name}-{plan.explain_id}-{number}" for number, name in enumerate(names)]
            hashes[modality] = names
        return hashes


def _name(plan: PromptPlan, item: ItemPlan, stock: str) -> str:
    gap = None if item.gap == CLOSED else item.gap
    return item_name(selection_key(plan, stock), gap, item.dropped)
