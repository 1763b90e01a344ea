# SPDX-License-Identifier: Apache-2.0
"""What one request asks of the selection, on its way through vLLM's processor and its caches."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.budget import Budget
from flashvlm_vllm.gaps import item_name
from flashvlm_vllm.visual_positions import VisualPositions

PLAN = "flashvlm_plan"
"""The processor argument that holds a request's ``VisualPlan``."""

CLOSED = -1
"""The gap of a pruned item whose places close up."""
_SELECTION_VERSION = 3
"""Part of every pruned item's identity. Raise it whenever the same request would keep other
tokens than before: external KV stores outlive a process."""


@dataclass(frozen=True)
class VisualPlan:
    """What one request asks of the selection; the same for each of its images and videos."""

    budget: Budget
    selector: str
    query_ids: tuple[int, ...]
    witness: str | None = None
    """A name of its own for a request whose selection is to be explained. It changes what vLLM's
    caches know the items by, so that none of them answers, and nothing of what is kept."""
    positions: VisualPositions = VisualPositions.KEPT

    def identity(self, stock: str) -> bytes:
        """Derive an item's identity, 32 bytes, from ``stock``, its identity without pruning.

        The kept tokens depend on the budget, the selector and the question, so a cache keyed by
        the pixels alone would answer one question with another's tokens. Where they stand does
        not change which are kept; vLLM's caches know it by the item's name (`gaps.item_name`).
        """
        wishes = [self.budget, self.selector, self.query_ids]
        factors = json.dumps([_SELECTION_VERSION, stock, *wishes])
        return hashlib.sha256(factors.encode()).digest()


class Pruned(NamedTuple):
    """What pruning takes from one item."""

    gap: int
    """Positions that the dropped tokens keep free, `CLOSED` where places close up."""
    dropped: int
    """Tokens; 0 where they could not be counted."""

    def name(self, identity: bytes) -> str:
        """Return what vLLM's caches know the item by."""
        return item_name(identity, None if self.gap == CLOSED else self.gap, self.dropped)


@dataclass
class PlannedInputs(ProcessorInputs):
    """Processor inputs of a request that is pruned; knows which of its items are."""

    pruned: Mapping[str, tuple[Pruned | None, ...]] = field(default_factory=dict)
    """By modality, one entry per item; ``None`` of one that stays whole."""

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Return stock identities for what is kept whole, derived ones for what is pruned."""
        plan = plan_of(self.hf_processor_mm_kwargs)
        stock_view = ProcessorInputs(
            **{each.name: getattr(self, each.name) for each in fields(ProcessorInputs)}
        )
        stock_view.hf_processor_mm_kwargs = without_plan(self.hf_processor_mm_kwargs)
        hashes = dict(stock_view.get_mm_hashes(*args, **kwargs))
        if plan is None:
            return hashes
        for modality, pruned in self.pruned.items():
            if modality in hashes:
                hashes[modality] = [
                    stock if each is None else each.name(plan.identity(stock))
                    for stock, each in zip(hashes[modality], pruned, strict=True)
                ]
                if plan.witness is not None:
                    hashes[modality] = [
                        f"{each}-{plan.witness}-{number}"
                        for number, each in enumerate(hashes[modality])
                    ]
        return hashes


def plan_of(kwargs: Mapping[str, Any]) -> VisualPlan | None:
    """Return the plan among a request's processor arguments, if there is one."""
    return kwargs.get(PLAN)


def without_plan(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return processor arguments as vLLM's own processors know them."""
    return {key: value for key, value in kwargs.items() if key != PLAN}
