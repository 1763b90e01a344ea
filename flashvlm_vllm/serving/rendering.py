# SPDX-License-Identifier: Apache-2.0
"""Passes a chat request's visual settings to the multimodal processor."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs

from flashvlm_vllm.ipc.prompt_report import REPORT
from flashvlm_vllm.request.budget import BUDGET
from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.load_levels import budget_at
from flashvlm_vllm.request.parts import item_settings
from flashvlm_vllm.request.question import query_from_messages
from flashvlm_vllm.request.read_request import REQUEST, VisualRequest
from flashvlm_vllm.request.refusal import Reason, Refusal, refusal_of
from flashvlm_vllm.request.steering import (
    Steering,
    item_queries,
    turns_of_messages,
)
from flashvlm_vllm.serving import metrics, request_context
from flashvlm_vllm.serving.sent_request import read_sent_request
from flashvlm_vllm.serving.tool_results import with_own_pictures
from flashvlm_vllm.serving.waiting import WAITING
from flashvlm_vllm.settings import ServerSettings, settings_of
from flashvlm_vllm.supported_models import covers, why_not_covered

Render = Callable[..., Awaitable[Any]]
CheckSelectors = Callable[[VisualRequest], None]


async def render_with_budget(
    render: Render,
    renderer: Any,
    trusting_renderer: Any,
    check_selectors: CheckSelectors,
    request: Any,
    messages: Sequence[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Render a chat request, and pass its visual settings as processor arguments.

    Args:
        render: vLLM's ``OnlineRenderer.preprocess_chat``.
        renderer: the server's renderer, which decides whether clients may send
            ``mm_processor_kwargs``.
        trusting_renderer: the same renderer, but it accepts the arguments added here.
        check_selectors: raises a refusal for selectors that are not installed.
        request: the chat request; unchanged afterwards.
        messages: the messages of the conversation.
        args, kwargs: passed to ``render``.

    Raises:
        Refusal: a visual field is not valid or not supported.

    """
    started = time.perf_counter()
    try:
        result = await _render(
            render, renderer, trusting_renderer, check_selectors, request, messages, args, kwargs
        )
    except Refusal as refusal:
        metrics.count_refusal(refusal.reason)
        request_context.record_refusal(refusal.reason)
        raise
    _take_reports(renderer, result, time.perf_counter() - started)
    return result


async def _render(
    render: Render,
    renderer: Any,
    trusting_renderer: Any,
    check_selectors: CheckSelectors,
    request: Any,
    messages: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    try:
        asked = replace(read_sent_request(request), items=item_settings(messages))
    except FieldError as error:
        raise refusal_of(error) from None
    if not covers(renderer.model_config):
        if asked.budget is not None or asked.items.has_budgets:
            raise Refusal(
                Reason.NOT_COVERED,
                f"{BUDGET}: the served model is not covered by the flashvlm plugin; "
                f"{why_not_covered(renderer.model_config)}",
                parameter=BUDGET,
            )
        return await render(renderer, request, messages, *args, **kwargs)

    check_selectors(asked)
    extra = _processor_arguments(asked, renderer, request, with_own_pictures(request, messages))
    if not extra:
        return await render(renderer, request, messages, *args, **kwargs)
    # Arguments of the client are checked as without the plugin; only those added are trusted.
    own = getattr(request, "mm_processor_kwargs", None)
    validate_request_mm_kwargs(
        mm_processor_kwargs=own,
        media_io_kwargs=getattr(request, "media_io_kwargs", None),
        trust_request_mm_kwargs=renderer.trust_request_mm_kwargs,
    )
    request.mm_processor_kwargs = {**(own or {}), **extra}
    try:
        return await render(trusting_renderer, request, messages, *args, **kwargs)
    finally:
        request.mm_processor_kwargs = own


def _processor_arguments(
    asked: VisualRequest, renderer: Any, request: Any, messages: Sequence[Any]
) -> dict[str, Any]:
    """Return the arguments to add; none if nothing can be pruned."""
    settings = settings_of(renderer.model_config)
    if not asked.has_budget:
        asked = replace(asked, under_load=budget_at(settings.under_load, WAITING.count()))
    if not _may_prune(asked, settings):
        return {REQUEST: VisualRequest(has_budget=True)} if asked.has_budget else {}
    # The processor applies the defaults, because it knows when they cannot apply.
    latest = query_from_messages(messages) if asked.query is None else asked.query
    # Words given for the whole request apply to all pictures, as those of the newest message.
    steering = asked.steering or settings.default_steering
    if asked.query is not None:
        steering = Steering.LATEST
    queries = item_queries(turns_of_messages(messages), latest, steering)
    limit = request.build_tok_params(renderer.model_config).max_output_tokens
    asked = replace(
        asked,
        query=latest,
        item_queries=queries,
        explain_id=request_context.explain_id(),
        answer=limit or None,
    )
    return {REQUEST: asked}


def _may_prune(asked: VisualRequest, settings: ServerSettings) -> bool:
    """Return whether any picture of the request may get a budget."""
    budget = asked.budget if asked.has_budget else settings.budget
    if budget is not None or asked.under_load is not None or asked.items.has_budgets:
        return True
    # A limit applies to a request for no pruning, too.
    asks = asked.has_budget or any(each.has_budget for own in asked.items.values() for each in own)
    return asks and settings.budget_max is not None


def _take_reports(renderer: Any, result: Any, seconds: float) -> None:
    """Remove the reports from a rendered request, record them, and count its items.

    Items are not counted for a request that is only rendered (``/tokenize``).
    """
    _, engine_inputs = result
    reports = [engine_input.pop(REPORT, None) for engine_input in engine_inputs]
    model = renderer.model_config.served_model_name
    if request_context.record_prompts(
        model, [each for each in reports if each is not None], seconds
    ):
        for each in reports:
            if each is not None:
                metrics.count_items(model, each)
