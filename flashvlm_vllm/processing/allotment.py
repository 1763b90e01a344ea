# SPDX-License-Identifier: Apache-2.0
"""Derives the budget of each item from the request, its content parts and the server's settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashvlm_vllm.ipc.gaps import RESERVE
from flashvlm_vllm.request.budget import BUDGET, Budget, BudgetSource, Clamp, Counts, TokenCount
from flashvlm_vllm.request.parts import NO_SETTINGS, ItemSettings
from flashvlm_vllm.request.read_request import VisualRequest
from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.request.request_budget import (
    FitBudget,
    RequestBudget,
    TotalBudget,
    largest_that_fits,
    shares_of_total,
)
from flashvlm_vllm.settings import ServerSettings


@dataclass(frozen=True)
class Allotment:
    """Budget and selector of one image or video."""

    budget: Budget | None
    """``None``: it is kept whole."""
    selector: str
    source: BudgetSource | None = None
    clamped: Clamp | None = None


Allotments = dict[str, list[Allotment]]
"""By modality, one entry per item."""


def allot(request: VisualRequest, settings: ServerSettings, counts: Counts) -> Allotments:
    """Return the budget of each item. A budget that must fit is treated as no pruning.

    The budget of an item's content part precedes that of the request, which precedes that of the
    server. A total is divided over the items without a budget of their own.

    Args:
        request: the request's settings.
        settings: the server's settings.
        counts: token counts of the items.

    Raises:
        Refusal: settings do not belong to the items, or a total is smaller than the number of
            items.

    """
    budget = request.budget if request.has_budget else settings.budget
    source = BudgetSource.REQUEST if request.has_budget else BudgetSource.DEFAULT
    shares = _shares(budget, request, counts)
    allotments: Allotments = {}
    for modality, known in counts.items():
        allotments[modality] = []
        own = own_settings(request, modality, len(known))
        for number, (count, item) in enumerate(zip(known, own, strict=True)):
            selector = item.selector or request.selector or settings.default_selector
            if item.has_budget:
                each = Allotment(item.budget, selector, BudgetSource.REQUEST)
            else:
                each = Allotment(shares[modality][number], selector, source)
                if not request.has_budget:
                    each = _under_load(each, count, request.under_load)
            allotments[modality].append(clamped(each, count, settings))
    return allotments


def own_settings(request: VisualRequest, modality: str, count: int) -> Sequence[ItemSettings]:
    """Return the settings in the content parts of one modality, one per item.

    Raises:
        Refusal: the request has settings for another number of items.

    """
    items = request.items.get(modality, ())
    if len(items) == count:
        return items
    if items:
        raise Refusal(
            Reason.BAD_BUDGET,
            f"{BUDGET}: settings in content parts cannot be assigned: the messages have "
            f"{len(items)} {modality} parts, the prompt has {count}",
            parameter=BUDGET,
        )
    return [NO_SETTINGS] * count


def clamped(allotment: Allotment, count: TokenCount | None, settings: ServerSettings) -> Allotment:
    """Return the allotment within the server's limits, which apply to what requests ask for."""
    if count is None or allotment.source is not BudgetSource.REQUEST:
        return allotment
    kept = count.kept(allotment.budget)
    low, high = settings.budget_min, settings.budget_max
    if high is not None and kept > count.kept(high):
        return replace(allotment, budget=high, clamped=Clamp.MAX)
    if low is not None and kept < count.kept(low):
        return replace(allotment, budget=low, clamped=Clamp.MIN)
    return allotment


def must_fit(request: VisualRequest, settings: ServerSettings) -> bool:
    """Return whether the budget is the largest with which prompt and answer fit."""
    budget = request.budget if request.has_budget else settings.budget
    return budget is FitBudget.FIT


def fitted(
    allotments: Allotments,
    counts: Counts,
    request: VisualRequest,
    settings: ServerSettings,
    length: int,
    context: int,
) -> Allotments:
    """Return the allotments with which prompt and answer fit into the context.

    Where the unpruned prompt fits, nothing changes. If the request does not limit its answer, a
    prompt that has to be pruned leaves a quarter of the context to it.

    Args:
        allotments: of all items; those of items without a budget of their own are replaced.
        counts: token counts of the items.
        request: the request's settings.
        settings: the server's settings.
        length: number of tokens of the prompt with these allotments.
        context: ``max_model_len``.

    Raises:
        Refusal: the prompt does not fit with the smallest budget.

    """
    if length + (request.answer or 1) <= context:
        return allotments
    open_items = _open_items(request, counts)
    answer = context // RESERVE if request.answer is None else request.answer
    now = sum(
        count.kept(allotments[modality][number].budget) for modality, number, count in open_items
    )
    text = length - now
    room = context - answer - text
    budget = largest_that_fits(room, [count for _, _, count in open_items])
    result = {modality: list(each) for modality, each in allotments.items()}
    needed = 0
    for modality, number, count in open_items:
        before = allotments[modality][number]
        least = max(count.floor, 1 if budget is None else budget)
        each = replace(before, budget=least, clamped=None)
        if before.source is BudgetSource.UNDER_LOAD:
            each = _under_load(each, count, before.budget)
        each = clamped(each, count, settings)
        result[modality][number] = each
        needed += count.kept(each.budget)
    if budget is None or needed > room:
        raise Refusal(
            Reason.DOES_NOT_FIT,
            f"{BUDGET}: even the smallest budget does not fit: {text} tokens of text and of items "
            f"with a budget of their own, at least {needed} of {len(open_items)} images and "
            f"videos, and {answer} for the answer exceed the context of {context} tokens",
            parameter=BUDGET,
        )
    return result


def _open_items(request: VisualRequest, counts: Counts) -> list[tuple[str, int, TokenCount]]:
    """Return modality, number and count of the items of known size without their own budget."""
    return [
        (modality, number, count)
        for modality, known in counts.items()
        for number, (count, own) in enumerate(
            zip(known, own_settings(request, modality, len(known)), strict=True)
        )
        if count is not None and not own.has_budget
    ]


def _shares(
    budget: RequestBudget | None, request: VisualRequest, counts: Counts
) -> dict[str, list[Budget | None]]:
    """Return the budget of each item that has none of its own; a total is divided."""
    if not isinstance(budget, TotalBudget):
        each = None if isinstance(budget, FitBudget) else budget
        return {modality: [each] * len(known) for modality, known in counts.items()}
    shares: dict[str, list[Budget | None]] = {
        modality: [None] * len(known) for modality, known in counts.items()
    }
    places = _open_items(request, counts)
    sizes = [count for _, _, count in places]
    least = sum(each.floor for each in sizes)
    if request.has_budget and budget.tokens < least:
        raise Refusal(
            Reason.BELOW_FLOOR,
            f"{BUDGET}: a total of {budget.tokens} tokens is too small for {len(sizes)} images and "
            "videos, of which one token each is kept, and of a video one per time step; the "
            f"smallest total is {least}",
            parameter=BUDGET,
        )
    # The server's default was not chosen for this request; it is raised to what is needed.
    for (modality, number, _), share in zip(
        places, shares_of_total(max(budget.tokens, least), sizes), strict=True
    ):
        shares[modality][number] = share
    return shares


def _under_load(allotment: Allotment, count: TokenCount | None, most: Budget | None) -> Allotment:
    """Return the allotment, with a smaller budget if the server is under load."""
    if most is None or (count is not None and count.kept(allotment.budget) <= count.kept(most)):
        return allotment
    return replace(allotment, budget=most, source=BudgetSource.UNDER_LOAD)
