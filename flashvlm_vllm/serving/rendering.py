# SPDX-License-Identifier: Apache-2.0
"""Hands a chat request's budget and question to the multimodal processor."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.budget import BUDGET
from flashvlm_vllm.plugin import MODELS, covers
from flashvlm_vllm.processing import REPORT, checked_selector, default_budget
from flashvlm_vllm.query import QUERY, query_from_messages
from flashvlm_vllm.selector import SELECTOR
from flashvlm_vllm.serving import metrics, report
from flashvlm_vllm.serving.settings import SettingsError, VisualSettings, read_settings

Render = Callable[..., Awaitable[Any]]


async def render_with_budget(
    render: Render,
    renderer: Any,
    trusting_renderer: Any,
    request: Any,
    messages: Sequence[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Render a chat request, with its visual settings as processor arguments.

    Args:
        render: vLLM's ``OnlineRenderer.preprocess_chat``.
        renderer: the server's renderer, which decides whether clients may pass
            ``mm_processor_kwargs`` of their own.
        trusting_renderer: the same renderer, accepting the arguments added here.
        request: the chat request; left as it was.
        messages: its conversation.
        args, kwargs: passed on to ``render``.

    Raises:
        VLLMValidationError: a visual field is not valid or asks for what cannot be done.

    """
    try:
        settings = read_settings(request)
    except SettingsError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from None
    if not covers(renderer.model_config):
        if settings.budget is not None:
            raise VLLMValidationError(
                f"{BUDGET}: the served model is not covered by the flashvlm plugin; covered "
                f"architectures are {', '.join(sorted(MODELS))}",
                parameter=BUDGET,
            )
        return await render(renderer, request, messages, *args, **kwargs)

    checked_selector(settings.selector)
    extra = _processor_arguments(settings, renderer, messages)
    if not extra:
        result = await render(renderer, request, messages, *args, **kwargs)
    else:
        # What the client sent is judged as ever; only what is added here is trusted.
        own = getattr(request, "mm_processor_kwargs", None)
        validate_request_mm_kwargs(
            mm_processor_kwargs=own,
            media_io_kwargs=getattr(request, "media_io_kwargs", None),
            trust_request_mm_kwargs=renderer.trust_request_mm_kwargs,
        )
        request.mm_processor_kwargs = {**(own or {}), **extra}
        try:
            result = await render(trusting_renderer, request, messages, *args, **kwargs)
        finally:
            request.mm_processor_kwargs = own
    _take_report(renderer, result)
    return result


def _processor_arguments(
    settings: VisualSettings, renderer: Any, messages: Sequence[Any]
) -> dict[str, Any]:
    """Return the arguments to add; none when neither request nor server wants pruning."""
    budget = settings.budget if settings.has_budget else default_budget(renderer.model_config)
    if budget is None:
        return {BUDGET: None} if settings.has_budget else {}
    query = query_from_messages(messages) if settings.query is None else settings.query
    # Defaults are left to the processor, which knows when they cannot apply.
    extra: dict[str, Any] = {QUERY: query}
    if settings.has_budget:
        extra[BUDGET] = budget
    if settings.selector is not None:
        extra[SELECTOR] = settings.selector
    return extra


def _take_report(renderer: Any, result: Any) -> None:
    _, engine_inputs = result
    for engine_input in engine_inputs:
        told = engine_input.pop(REPORT, None)
        if told is not None:
            metrics.count_tokens(renderer.model_config.served_model_name, told.counts)
            report.note(told.counts, told.unproven)
