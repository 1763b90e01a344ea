# SPDX-License-Identifier: Apache-2.0
"""Fails requests for whose items a selector of another package failed, or an untested model.

The worker records such failures and uses evenly spaced tokens or zeros instead, so that the engine
and other requests continue. This module replaces the response by an error. For the built-in
selectors on tested models the worker is not asked.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types.responses import ResponseErrorEvent
from vllm.exceptions import GenerationError

from flashvlm_vllm.ipc.worker_calls import find_selector_failures
from flashvlm_vllm.request.refusal import Reason
from flashvlm_vllm.serving import metrics, request_context
from flashvlm_vllm.serving.streamed_events import error_events

_BEFORE_THE_ENGINE = frozenset({"response.created", "response.in_progress"})


async def checked(answer: Any, fallible_items: Sequence[str], handler: Any) -> Any:
    """Return the response, or an error in its place if a selection for it failed.

    Args:
        answer: result of a vLLM handler: a response, an error, or a stream of events.
        fallible_items: selection keys of the items to check; usually none.
        handler: the vLLM handler.

    """
    if not fallible_items:
        return answer
    if isinstance(answer, AsyncIterator):
        return _checked_stream(answer, fallible_items, handler)
    error = await _failure(fallible_items, handler)
    return answer if error is None else handler.create_error_response(error)


async def _checked_stream(
    stream: AsyncIterator[Any], fallible_items: Sequence[str], handler: Any
) -> AsyncIterator[Any]:
    is_checked = False
    async for event in stream:
        if not is_checked and getattr(event, "type", None) not in _BEFORE_THE_ENGINE:
            # After the first token, every image of the prompt has been encoded.
            is_checked = True
            error = await _failure(fallible_items, handler)
            if error is not None:
                if isinstance(event, str):
                    for each in error_events(error, event, handler):
                        yield each
                else:
                    yield ResponseErrorEvent(
                        type="error",
                        code="server_error",
                        message=str(error),
                        sequence_number=event.sequence_number,
                    )
                return
        yield event


async def _failure(fallible_items: Sequence[str], handler: Any) -> GenerationError | None:
    failures = await find_selector_failures(handler.engine_client, fallible_items)
    for message in failures.values():
        metrics.count_refusal(Reason.SELECTOR_FAILED)
        request_context.record_refusal(Reason.SELECTOR_FAILED)
        return GenerationError(message)
    return None
