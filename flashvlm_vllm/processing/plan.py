# SPDX-License-Identifier: Apache-2.0
"""What is going to happen to a prompt's items, on its way through vLLM's processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.multimodal.parse import MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import CLOSED
from flashvlm_vllm.request.budget import Budget, TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions


@dataclass
class ItemPlan:
    """What is going to happen to one image or video."""

    count: TokenCount | None
    """``None`` where the item's size is not known here."""
    keep: int | None
    """Tokens that stay; ``None`` likewise."""
    is_pruned: bool
    gap: int = CLOSED
    """Positions that the dropped tokens keep free; `CLOSED` where positions close up."""
    dropped: int = 0
    """Tokens; 0 where they could not be counted."""
    selection_key: bytes | None = None
    """Set when the item is processed; an item in vLLM's cache is not."""

    @classmethod
    def of(
        cls,
        count: TokenCount | None,
        budget: Budget | None,
        positions: VisualPositions,
        axes: int,
    ) -> "ItemPlan":
        """Plan one item.

        Args:
            count: its tokens.
            budget: in force for it.
            positions: of its kept tokens.
            axes: of the model's positions. With M-RoPE no positions stay free: a whole item has
                fewer of them than tokens.

        """
        if count is None:
            return cls(None, None, is_pruned=budget is not None)
        keep = count.kept(budget)
        if budget is None or keep == count.total:
            return cls(count, keep, is_pruned=False)
        dropped = count.total - keep
        gap = CLOSED
        if positions is VisualPositions.KEPT:
            gap = dropped if axes == 1 else 0
        return cls(count, keep, True, gap, dropped)


@dataclass(frozen=True)
class PromptPlan:
    """What is asked of all items of a prompt."""

    budget: Budget
    selector: str
    question_ids: tuple[int, ...]
    """Token ids of the words that guide the selection."""
    explain_id: str | None = None
    """Set where the selection is to be explained."""


class PlannedItems(MultiModalDataItems):
    """A prompt's items, or those of them that vLLM has not processed yet, with their plans.

    vLLM passes the items to every step of its processor, so the plans need no way of their own.
    """

    def __init__(
        self,
        items: MultiModalDataItems,
        plan: PromptPlan,
        plans: Mapping[str, Sequence[ItemPlan]],
    ) -> None:
        """Attach plans to items.

        Args:
            items: by modality.
            plan: of the prompt.
            plans: by modality, one per item.

        """
        super().__init__(dict(items))
        self.plan = plan
        self.plans = {modality: list(own) for modality, own in plans.items()}

    def only(
        self, items: MultiModalDataItems, is_cached: Mapping[str, Sequence[bool]]
    ) -> "PlannedItems":
        """Return the items that are not cached, with their plans.

        Args:
            items: those that are not cached.
            is_cached: by modality, an entry per item of this object.

        """
        plans = {
            modality: [
                own
                for own, cached in zip(plans, is_cached.get(modality, ()), strict=False)
                if not cached
            ]
            for modality, plans in self.plans.items()
        }
        return PlannedItems(items, self.plan, plans)
