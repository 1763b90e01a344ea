# SPDX-License-Identifier: Apache-2.0
"""Hands a chat request's budget and question to the multimodal processor."""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs

from flashvlm_vllm.budget import BUDGET
from flashvlm_vllm.explained import WITNESS
from flashvlm_vllm.plugin import MODELS, covers
from flashvlm_vllm.processing import checked_selector, default_budget
from flashvlm_vllm.query import QUERY, query_from_messages
from flashvlm_vllm.refusal import Reason, Refusal
from flashvlm_vllm.selector import SELECTOR
from flashvlm_vllm.serving import metrics, report
from flashvlm_vllm.serving.settings import SettingsError, VisualSettings, read_settings
from flashvlm_vllm.visual_positions import VISUAL_POSITIONS
from flashvlm_vllm.visual_report import REPORT

Render = Callable[..., Awaitable[Any]]

_REASONS = {
    BUDGET: Reason.BAD_BUDGET,
    f"metadata.{BUDGET}": Reason.BAD_BUDGET,
    QUERY: Reason.BAD_QUERY,
    SELECTOR: Reason.BAD_SELECTOR,
    VISUAL_POSITIONS: Reason.BAD_POSITIONS,
}
"""By the field that is not valid."""


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
        Refusal: a visual field is not valid or asks for what cannot be done.

    """
    started = time.perf_counter()
    try:
        result = await _render(render, renderer, trusting_renderer, request, messages, args, kwargs)
    except Refusal as refusal:
        metrics.count_refusal(refusal.reason)
        report.note_refusal(refusal.reason)
        raise
    _take_reports(renderer, result, time.perf_counter() - started)
    return result


async def _render(
    render: Render,
    renderer: Any,
    trusting_renderer: Any,
    request: Any,
    messages: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    try:
        settings = read_settings(request)
    except SettingsError as error:
        raise Refusal(_REASONS[error.field], str(error), parameter=error.field) from None
    if not covers(renderer.model_config):
        if settings.budget is not None:
            raise Refusal(
                Reason.NOT_COVERED,
                f"{BUDGET}: the served model is not covered by the flashvlm plugin; covered "
                f"architectures are {', '.join(sorted(MODELS))}",
                parameter=BUDGET,
            )
        return await render(renderer, request, messages, *args, **kwargs)

    checked_selector(settings.selector)
    extra = _processor_arguments(settings, renderer, messages)
    if not extra:
        return await render(renderer, request, messages, *args, **kwargs)
    # What the client sent is judged as ever; only what is added here is trusted.
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
    if settings.positions is not None:
        extra[VISUAL_POSITIONS] = str(settings.positions)
    witness = report.witness()
    if witness is not None:
        extra[WITNESS] = witness
    return extra


def _take_reports(renderer: Any, result: Any, seconds: float) -> None:
    """Take out of a rendered request what it is going to cost, and say so where it counts.

    A request that is only rendered (``/tokenize``) costs nothing, so nothing is counted.
    """
    _, engine_inputs = result
    reports = [engine_input.pop(REPORT, None) for engine_input in engine_inputs]
    model = renderer.model_config.served_model_name
    if report.note(model, [each for each in reports if each is not None], seconds):
        for each in reports:
            if each is not None:
                metrics.count_items(model, each)
