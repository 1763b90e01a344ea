# SPDX-License-Identifier: Apache-2.0
"""Plans of a prompt and its items, which are passed through vLLM's processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.multimodal.parse import MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import CLOSED
from flashvlm_vllm.request.budget import Budget, TokenCount
from flashvlm_vllm.request.visual_positions import VisualPositions


@dataclass
class ItemPlan:
    """How one image or video is pruned."""

    count: TokenCount | None
    """``None`` if the item's size is not known."""
    keep: int | None
    """Number of tokens to keep; ``None`` if the item's size is not known."""
    is_pruned: bool
    gap: int = CLOSED
    """Positions that the dropped tokens leave unused; `CLOSED` for consecutive positions."""
    dropped: int = 0
    """Number of dropped tokens; 0 if the item's size is not known."""
    question_ids: tuple[int, ...] = ()
    """Token ids of the words that guide its selection."""
    selection_key: bytes | None = None
    """Set when the item is processed. An item in vLLM's cache is not processed."""

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
            count: token counts of the item.
            budget: the budget that applies to it.
            positions: positions of its kept tokens.
            axes: number of axes of the model's positions. With M-RoPE the gap is 0, because even a
                whole item has fewer positions than tokens.

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
    """Settings that apply to all items of a prompt."""

    budget: Budget
    selector: str
    explain_id: str | None = None
    """Set if the selection is to be explained."""


class PlannedItems(MultiModalDataItems):
    """A prompt's items, or those that vLLM has not processed yet, with their plans.

    vLLM passes the items to every step of its processor, and the plans with them.
    """

    def __init__(
        self,
        items: MultiModalDataItems,
        plan: PromptPlan,
        plans: Mapping[str, Sequence[ItemPlan]],
    ) -> None:
        """Attach plans to items.

        Args:
            items: items by modality.
            plan: plan of the prompt.
            plans: plans of the items by modality, one per item.

        """
        super().__init__(dict(items))
        self.plan = plan
        self.plans = {modality: list(own) for modality, own in plans.items()}

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
        return PlannedItems(items, self.plan, plans)
