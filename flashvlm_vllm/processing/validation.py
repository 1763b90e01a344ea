# SPDX-License-Identifier: Apache-2.0
"""Checks of a request that depend on its items or on the installed selectors."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.multimodal.parse import EmbeddingItems, MultiModalDataItems

from flashvlm_vllm.ipc.item_fields import MODALITIES
from flashvlm_vllm.request.budget import BUDGET, Budget, TokenCount
from flashvlm_vllm.request.question import QUERY
from flashvlm_vllm.request.read_request import FieldError, VisualRequest, read_arguments
from flashvlm_vllm.request.refusal import Reason, Refusal, refusal_of
from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector

Counts = Mapping[str, Sequence[TokenCount | None]]
"""Token counts by modality, one per item; ``None`` if the item's size is not known."""


def checked_arguments(arguments: Mapping[str, Any]) -> tuple[VisualRequest, dict[str, Any]]:
    """Separate a request's visual settings from its other processor arguments, and check them.

    Raises:
        Refusal: a value is not valid.

    """
    try:
        request, others = read_arguments(arguments)
    except FieldError as error:
        raise refusal_of(error) from None
    check_selector(request.selector)
    return request, others


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


def refuse_embeddings(modality: str) -> None:
    """Refuse a budget for precomputed embeddings.

    Raises:
        Refusal: always.

    """
    raise Refusal(
        Reason.EMBEDDINGS,
        f"a visual budget needs the {modality} itself: precomputed {modality} embeddings have no "
        f"saliency. Send the {modality}, or {BUDGET}: null",
        parameter=BUDGET,
    )


def refuse_below_floor(budget: Budget | None, counts: Counts) -> None:
    """Refuse a request's budget, as a number of tokens, that is below the floor of an item.

    A fraction, or the server's default budget, is raised to the floor instead, because it was not
    chosen for this item.

    Raises:
        Refusal: the number is below the floor of an item.

    """
    if not isinstance(budget, int):
        return
    for modality, known in counts.items():
        for number, count in enumerate(known):
            if count is not None and budget < count.floor:
                raise Refusal(
                    Reason.BELOW_FLOOR,
                    f"{BUDGET}: {budget} tokens are too few for {modality} {number}, of which one "
                    f"token per time step is kept; the smallest budget for it is {count.floor}, "
                    "or a fraction",
                    parameter=BUDGET,
                )


def refuse_too_large(selector: str, counts: Counts) -> None:
    """Refuse an item with more tokens than the selector accepts.

    Raises:
        Refusal: an item has more tokens than the selector accepts.

    """
    most = find_selector(selector).most_tokens
    if most is None:
        return
    for modality, known in counts.items():
        for number, count in enumerate(known):
            if count is not None and count.total > most:
                raise Refusal(
                    Reason.TOO_LARGE,
                    f"{SELECTOR}: {selector} takes at most {most} visual tokens of one item, "
                    f"{modality} {number} has {count.total}; send a smaller one, or name another "
                    f"selector ({', '.join(BUILT_IN)})",
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
