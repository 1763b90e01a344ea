# SPDX-License-Identifier: Apache-2.0
"""Reads a request's visual settings from its fields or its ``metadata``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flashvlm_vllm.request.budget import BUDGET, Budget
from flashvlm_vllm.request.field_error import parsed
from flashvlm_vllm.request.parts import ITEMS, PromptItems
from flashvlm_vllm.request.question import QUERY, parse_query
from flashvlm_vllm.request.request_budget import (
    RequestBudget,
    parse_request_budget,
    parse_request_budget_text,
)
from flashvlm_vllm.request.selector_name import SELECTOR, parse_selector
from flashvlm_vllm.request.steering import VISUAL_STEERING, Steering, parse_steering
from flashvlm_vllm.request.visual_positions import (
    VISUAL_POSITIONS,
    VisualPositions,
    parse_positions,
)

REQUEST = "flashvlm_request"
"""The processor argument under which the renderer passes a ``VisualRequest``."""


@dataclass(frozen=True)
class VisualRequest:
    """Visual settings of one request.

    ``has_budget`` distinguishes an explicit ``null`` (no pruning for this request) from a missing
    field (the server's default).
    """

    has_budget: bool = False
    budget: RequestBudget | None = None
    query: str | None = None
    """Words that guide the selection; ``None``: the words of the latest user message."""
    selector: str | None = None
    positions: VisualPositions | None = None
    steering: Steering | None = None
    item_queries: Mapping[str, tuple[str, ...]] | None = None
    """By modality, the words that guide the selection of each picture; ``None`` where ``query`` was
    given for all, or offline, where the prompt has them."""
    explain_id: str | None = None
    """Unique id of a request whose selection is to be explained."""
    items: PromptItems = field(default_factory=PromptItems)
    """Settings of the pictures' content parts."""
    under_load: Budget | None = None
    """Set while too many requests wait: the most that a request without a budget keeps."""
    answer: int | None = None
    """Most tokens to generate; ``None``: not limited by the request, or offline."""


def read_request(request: Any) -> VisualRequest:
    """Read a request's visual fields.

    Args:
        request: a pydantic request model. Declared fields were validated when it was created;
            extra fields of vLLM's own models (``run-batch``, ``/tokenize``) are checked here.

    Raises:
        FieldError: a field is not valid; the message says what is allowed.

    """
    given = request.model_fields_set
    declared = type(request).model_fields
    metadata = getattr(request, "metadata", None)
    metadata = metadata if isinstance(metadata, Mapping) else {}

    def read(name: str, parse: Callable[[object], Any]) -> Any:
        if name in given:
            value = getattr(request, name)
            return value if name in declared else parsed(parse, value, name)
        return parsed(parse, metadata.get(name), name)

    has_budget, budget = BUDGET in given or BUDGET in metadata, None
    if BUDGET in given:
        budget = read(BUDGET, parse_request_budget)
    elif has_budget:
        budget = parsed(parse_request_budget_text, metadata[BUDGET], f"metadata.{BUDGET}")
    return VisualRequest(
        has_budget,
        budget,
        read(QUERY, parse_query),
        # Declared as a string; whether it can be a name is checked here.
        parsed(parse_selector, read(SELECTOR, parse_selector), SELECTOR),
        read(VISUAL_POSITIONS, parse_positions),
        read(VISUAL_STEERING, parse_steering),
    )


def read_arguments(arguments: Mapping[str, Any]) -> tuple[VisualRequest, dict[str, Any]]:
    """Separate a request's visual settings from its other processor arguments.

    Args:
        arguments: contains a ``VisualRequest`` from the renderer or, offline, the values passed to
            ``LLM.generate`` as ``mm_processor_kwargs``, which are checked here.

    Returns:
        The settings, and all other arguments.

    Raises:
        FieldError: a value is not valid; the message says what is allowed.

    """
    others = dict(arguments)
    typed = others.pop(REQUEST, None)
    items = others.pop(ITEMS, None)
    has_budget = BUDGET in others
    budget, query, selector, positions, steering = (
        others.pop(name, None)
        for name in (BUDGET, QUERY, SELECTOR, VISUAL_POSITIONS, VISUAL_STEERING)
    )
    given = VisualRequest(
        has_budget,
        parsed(parse_request_budget, budget, BUDGET),
        parsed(parse_query, query, QUERY),
        parsed(parse_selector, selector, SELECTOR),
        parsed(parse_positions, positions, VISUAL_POSITIONS),
        parsed(parse_steering, steering, VISUAL_STEERING),
        items=items if isinstance(items, PromptItems) else PromptItems(),
    )
    return (_over(typed, given) if isinstance(typed, VisualRequest) else given), others


def _over(fields: VisualRequest, arguments: VisualRequest) -> VisualRequest:
    """Merge the two; a request's fields take precedence over its processor arguments."""
    budget_of = fields if fields.has_budget else arguments
    return replace(
        fields,
        has_budget=budget_of.has_budget,
        budget=budget_of.budget,
        query=arguments.query if fields.query is None else fields.query,
        selector=fields.selector or arguments.selector,
        positions=fields.positions or arguments.positions,
        steering=fields.steering or arguments.steering,
    )
