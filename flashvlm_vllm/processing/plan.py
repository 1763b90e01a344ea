# SPDX-License-Identifier: Apache-2.0
"""Plans of a prompt's items, which are passed through vLLM's processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.multimodal.parse import MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import CLOSED, NO_TURN, TurnIds
from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.request.budget import ItemCount, TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions


@dataclass
class ItemPlan:
    """How one image or video is pruned."""

    count: TokenCount | None
    """``None`` if the item's size is not known."""
    allotment: Allotment
    """Its budget and selector."""
    keep: int | None
    """Number of tokens to keep; ``None`` if the item's size is not known."""
    is_pruned: bool
    gap: int = CLOSED
    """Positions that the dropped tokens leave unused; `CLOSED` for consecutive positions."""
    dropped: int = 0
    """Number of dropped tokens; 0 if the item's size is not known."""
    question_ids: tuple[int, ...] = ()
    """Token ids of the words that guide its selection."""
    turn_ids: TurnIds = NO_TURN
    """Token ids of the chat template around a question, if the selector uses the language model."""
    selection_key: bytes | None = None
    """Set when the item is processed. An item in vLLM's cache is not processed."""

    @classmethod
    def of(
        cls,
        count: TokenCount | None,
        allotment: Allotment,
        positions: VisualPositions,
        axes: int,
    ) -> "ItemPlan":
        """Plan one item.

        Args:
            count: token counts of the item.
            allotment: its budget and selector.
            positions: positions of its kept tokens.
            axes: number of axes of the model's positions. With M-RoPE the gap is 0, because even a
                whole item has fewer positions than tokens.

        """
        budget = allotment.budget
        if count is None:
            return cls(None, allotment, None, is_pruned=budget is not None)
        keep = count.kept(budget)
        if budget is None or keep == count.total:
            return cls(count, allotment, keep, is_pruned=False)
        dropped = count.total - keep
        gap = CLOSED
        if positions is VisualPositions.KEPT:
            gap = dropped if axes == 1 else 0
        return cls(count, allotment, keep, True, gap, dropped)

    def reported(self, kind: str) -> ItemCount:
        """Return the counts of an item whose size is known, for responses and metrics."""
        assert self.count is not None and self.keep is not None
        own = self.allotment
        if own.budget is None:
            return ItemCount(self.count.total, self.keep, kind)
        return ItemCount(self.count.total, self.keep, kind, own.source, own.selector, own.clamped)


class PlannedItems(MultiModalDataItems):
    """A prompt's items, or those that vLLM has not processed yet, with their plans.

    vLLM passes the items to every step of its processor, and the plans with them.
    """

    def __init__(
        self,
        items: MultiModalDataItems,
        plans: Mapping[str, Sequence[ItemPlan]],
        explain_id: str | None = None,
    ) -> None:
        """Attach plans to items.

        Args:
            items: items by modality.
            plans: plans of the items by modality, one per item.
            explain_id: set if the selection is to be explained.

        """
        super().__init__(dict(items))
        self.plans = {modality: list(own) for modality, own in plans.items()}
        self.explain_id = explain_id
        self.added_inputs: dict[str, set[str]] = {}
        """By modality, the model inputs that this plugin added."""

    def only(
        self, items: MultiModalDataItems, is_cached: Mapping[str, Sequence[bool]]
    ) -> "PlannedItems":
        """Return the items that are not cached, with their plans.

        Args:
            items: the items that are not cached.
            is_cached: by modality, one entry per item of this object.

        """
        plans = {
            modality: [
                own
                for own, cached in zip(plans, is_cached.get(modality, ()), strict=False)
                if not cached
            ]
            for modality, plans in self.plans.items()
        }
        return PlannedItems(items, plans, self.explain_id)

    def remove_from_whole_items(self, processed: Any) -> None:
        """Remove this plugin's inputs from items that are kept whole: vLLM encodes them.

        An explained item keeps them, so that the worker records it.

        Args:
            processed: vLLM's ``MultiModalKwargsItems`` of these items.

        """
        if self.explain_id is not None:
            return
        for modality, names in self.added_inputs.items():
            for item, plan in zip(processed[modality], self.plans[modality], strict=True):
                if not plan.is_pruned:
                    for name in names:
                        item.pop(name, None)
