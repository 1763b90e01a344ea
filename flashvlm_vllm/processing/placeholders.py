# SPDX-License-Identifier: Apache-2.0
"""Shortens the placeholders of pruned items."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from vllm.multimodal.processing import PromptInsertion, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.processor import PromptUpdateInfo

from flashvlm_vllm.processing.plan import ItemPlan
from flashvlm_vllm.request.budget import TokenCount

Shorten = Callable[[Any, TokenCount, int], Any]
"""Type of `FamilyHooks.shorten_placeholder`."""


def first_embeddings(whole: PromptUpdateInfo, count: TokenCount, keep: int) -> Any:
    """Return a placeholder with as many embeddings as tokens are kept.

    Args:
        whole: vLLM's placeholder: token ids, all or some of which get embeddings.
        count: token counts of the item; its total is the number of embeddings in ``whole``.
        keep: number of embeddings to keep, the first ones. All ids without embeddings are kept.

    Raises:
        TypeError: the number of embeddings in the placeholder differs from the count.

    """
    ids = whole if isinstance(whole, list) else whole.full
    is_embed = None if isinstance(whole, list) else whole.is_embed
    embedded = [True] * len(ids) if is_embed is None else is_embed(ids).tolist()
    if sum(embedded) != count.total:
        raise TypeError(
            f"an item has {count.total} visual tokens but its placeholder has "
            f"{sum(embedded)}; this model needs its own shorten_placeholder"
        )
    number = accumulate(embedded)
    shorter = [
        each
        for each, has_embedding, seen in zip(ids, embedded, number, strict=True)
        if not has_embedding or seen <= keep
    ]
    return shorter if isinstance(whole, list) else replace(whole, full=shorter)


def shortened(update: PromptUpdate, plans: Sequence[ItemPlan], shorten: Shorten) -> PromptUpdate:
    """Return a prompt update that inserts the shortened placeholders of planned items.

    Args:
        update: vLLM's prompt update of one modality.
        plans: plans of the items of that modality.
        shorten: shortens one placeholder.

    """
    if not isinstance(update, PromptInsertion | PromptReplacement):
        return update
    whole = update.content

    def content(item_idx: int) -> Any:
        plan = plans[item_idx]
        placeholder = whole(item_idx) if callable(whole) else whole
        if plan.count is None or plan.keep is None:
            return placeholder
        return shorten(placeholder, plan.count, plan.keep)

    if isinstance(update, PromptInsertion):
        return replace(update, insertion=content)
    return replace(update, replacement=content)
