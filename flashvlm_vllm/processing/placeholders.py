# SPDX-License-Identifier: Apache-2.0
"""Shortens the placeholders of pruned items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from vllm.multimodal.processing import PromptInsertion, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.processor import (
    PlaceholderFeaturesInfo,
    PromptUpdateInfo,
    ResolvedPromptUpdate,
)

from flashvlm_vllm.processing.plan import ItemPlan
from flashvlm_vllm.request.budget import TokenCount

Shorten = Callable[[Any, TokenCount, int], Any]
"""Type of `FamilyHooks.shorten_placeholder`."""
Updates = Mapping[str, Sequence[Sequence[ResolvedPromptUpdate]]]
Placed = Mapping[str, Sequence[PlaceholderFeaturesInfo]]


class InPrompt(list[int]):
    """Target of a prompt update: an item's unpruned placeholder, which the prompt already has.

    Some chat templates write whole placeholders. vLLM then only finds them, with the target ``[]``.
    """


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

    def placeholder(item_idx: int) -> Any:
        return whole(item_idx) if callable(whole) else whole

    def content(item_idx: int) -> Any:
        plan = plans[item_idx]
        if plan.count is None or plan.keep is None:
            return placeholder(item_idx)
        return shorten(placeholder(item_idx), plan.count, plan.keep)

    def in_prompt(item_idx: int) -> Any:
        if not plans[item_idx].is_pruned:
            return []
        own = placeholder(item_idx)
        return InPrompt(own if isinstance(own, list) else own.full)

    if isinstance(update, PromptInsertion):
        return replace(update, insertion=content)
    if update.target == []:
        return replace(update, target=in_prompt, replacement=content)
    return replace(update, replacement=content)


def unpruned(updates: Updates) -> Updates | None:
    """Return updates with which vLLM finds the unpruned placeholders that a prompt already has.

    Args:
        updates: of all items, by modality.

    Returns:
        ``None`` if no item is pruned whose placeholder is in the prompt.

    """
    every = (each for items in updates.values() for own in items for each in own)
    if not any(isinstance(each.target, InPrompt) for each in every):
        return None
    return {
        modality: [
            [
                each.with_content(list(each.target)) if isinstance(each.target, InPrompt) else each
                for each in own
            ]
            for own in items
        ]
        for modality, items in updates.items()
    }


def shortened_in_prompt(
    prompt: Sequence[int], placed: Placed, updates: Updates
) -> tuple[list[int], dict[str, list[PlaceholderFeaturesInfo]]]:
    """Return a prompt with shortened placeholders, and where they are.

    Args:
        prompt: token ids, with the unpruned placeholders.
        placed: the placeholders in it, found with the updates of `unpruned`.
        updates: of all items, by modality.

    """
    ids: list[int] = []
    moved: dict[str, list[PlaceholderFeaturesInfo]] = {modality: [] for modality in placed}
    end = 0
    every = (each for items in placed.values() for each in items)
    for each in sorted(every, key=lambda found: found.start_idx):
        ids += prompt[end : each.start_idx]
        end = each.start_idx + each.length
        tokens, is_embed = each.tokens, each.is_embed
        for update in updates[each.modality][each.item_idx]:
            if isinstance(update.target, InPrompt):
                tokens, mask = update.content.full, update.content.is_embed
                is_embed = None if mask is None else mask(tokens)
        place = replace(each, start_idx=len(ids), tokens=tokens, is_embed=is_embed)
        moved[each.modality].append(place)
        ids += tokens
    return [*ids, *prompt[end:]], moved
