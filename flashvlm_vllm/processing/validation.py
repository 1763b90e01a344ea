# SPDX-License-Identifier: Apache-2.0
"""Checks of a request that depend on its items or on the installed selectors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.multimodal.parse import EmbeddingItems, MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import MODALITIES
from flashvlm_vllm.processing.allotment import Allotment
from flashvlm_vllm.processing.plan import ItemPlan
from flashvlm_vllm.request.budget import BUDGET, BudgetSource, Counts
from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.question import QUERY
from flashvlm_vllm.request.read_request import VisualRequest, read_arguments
from flashvlm_vllm.request.refusal import Reason, Refusal, refusal_of
from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector
from flashvlm_vllm.settings import ServerSettings


def checked_arguments(arguments: Mapping[str, Any]) -> tuple[VisualRequest, dict[str, Any]]:
    """Separate a request's visual settings from its other processor arguments, and check them.

    Raises:
        Refusal: a value is not valid.

    """
    try:
        request, others = read_arguments(arguments)
    except FieldError as error:
        raise refusal_of(error) from None
    check_selectors(request)
    return request, others


def check_selectors(request: VisualRequest) -> None:
    """Refuse selectors of a request or of its items that are not installed.

    Raises:
        Refusal: there is no such selector.

    """
    check_selector(request.selector)
    for own in request.items.values():
        for each in own:
            check_selector(each.selector)


def check_selector(name: str | None) -> None:
    """Refuse a selector that is not installed; the message lists the installed ones.

    Raises:
        Refusal: there is no such selector.

    """
    if name is None:
        return
    try:
        find_selector(name)
    except ValueError as error:
        raise Refusal(Reason.UNKNOWN_SELECTOR, f"{SELECTOR}: {error}", parameter=SELECTOR) from None


def embedding_modality(items: MultiModalDataItems) -> str | None:
    """Return the first modality with precomputed embeddings; ``None`` if there is none."""
    given = (each for each in MODALITIES if isinstance(items.get(each), EmbeddingItems))
    return next(given, None)


def applicable(
    request: VisualRequest, settings: ServerSettings, items: MultiModalDataItems
) -> tuple[VisualRequest, ServerSettings]:
    """Return the request's and the server's settings as they apply to items.

    The server's budgets and limits do not apply to a prompt with precomputed embeddings.

    Raises:
        Refusal: the request has a budget for embeddings.

    """
    modality = embedding_modality(items)
    if modality is None:
        return request, settings
    own = request.items.get(modality, ())
    is_asked = request.has_budget and request.budget is not None
    if is_asked or any(each.budget is not None for each in own):
        raise Refusal(
            Reason.EMBEDDINGS,
            f"a visual budget needs the {modality} itself: precomputed {modality} embeddings have "
            f"no saliency. Send the {modality}, or {BUDGET}: null",
            parameter=BUDGET,
        )
    settings = replace(settings, budget=None, budget_min=None, budget_max=None)
    return replace(request, under_load=None), settings


def refuse_below_floor(allotments: Mapping[str, Sequence[Allotment]], counts: Counts) -> None:
    """Refuse a request's budget, as a number of tokens, that is below the floor of an item.

    A fraction, or the server's default budget, is raised to the floor instead, because it was not
    chosen for this item.

    Raises:
        Refusal: the number is below the floor of an item.

    """
    for modality, known in counts.items():
        for number, (count, own) in enumerate(zip(known, allotments[modality], strict=True)):
            is_asked = own.source is BudgetSource.REQUEST and own.clamped is None
            if not is_asked or not isinstance(own.budget, int):
                continue
            if count is not None and own.budget < count.floor:
                raise Refusal(
                    Reason.BELOW_FLOOR,
                    f"{BUDGET}: {own.budget} tokens are too few for {modality} {number}, of which "
                    f"one token per time step is kept; the smallest budget for it is {count.floor},"
                    " or a fraction",
                    parameter=BUDGET,
                )


def refuse_llm_selectors(plans: Mapping[str, Sequence[ItemPlan]], settings: ServerSettings) -> None:
    """Refuse a selector that uses the language model, if it cannot be used.

    Raises:
        Refusal: a pruned item has such a selector.

    """
    if settings.no_llm_selectors is None:
        return
    for known in plans.values():
        for each in known:
            name = each.allotment.selector
            if each.is_pruned and find_selector(name).uses_llm:
                raise Refusal(
                    Reason.NOT_COVERED,
                    f"{SELECTOR}: {name} uses the first layers of the language model, but "
                    f"{settings.no_llm_selectors}; name another selector",
                    parameter=SELECTOR,
                )


def refuse_too_large(plans: Mapping[str, Sequence[ItemPlan]]) -> None:
    """Refuse a pruned item with more tokens than its selector accepts.

    Raises:
        Refusal: an item has more tokens than the selector accepts.

    """
    for modality, known in plans.items():
        for number, each in enumerate(known):
            if each.count is None or not each.is_pruned:
                continue
            selector = each.allotment.selector
            most = find_selector(selector).most_tokens
            if most is not None and each.count.total > most:
                raise Refusal(
                    Reason.TOO_LARGE,
                    f"{SELECTOR}: {selector} takes at most {most} visual tokens of one item, "
                    f"{modality} {number} has {each.count.total}; send a smaller one, or name "
                    f"another selector ({', '.join(BUILT_IN)})",
                    parameter=SELECTOR,
                )


def too_many_words(found: str, longest: int) -> Refusal:
    """Return the refusal of a question that is longer than the model's context."""
    return Refusal(
        Reason.BAD_QUERY,
        f"{QUERY}: the words that guide the selection have {found}; at most {longest} tokens are "
        "allowed, the length of the model's context",
        parameter=QUERY,
    )
