# SPDX-License-Identifier: Apache-2.0
"""``usage.visual_tokens`` in Anthropic's responses, which vLLM converts from chat completions."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage
from vllm.exceptions import GenerationError

from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.serving.usage import FIELD, event_with_counts

_CHAT_EVENT = "data: "
_CHAT_ERROR = 'data: {"error"'
_WITH_USAGE = ("event: message_start\n", "event: message_delta\n")


class VisualUsage(AnthropicUsage):
    """Token usage with the counts of ``usage.summary``."""

    visual_tokens: dict[str, Any]


class VisualMessagesResponse(AnthropicMessagesResponse):
    """A response whose usage has the counts."""

    usage: VisualUsage | None = None


def with_counts(response: AnthropicMessagesResponse, chat_response: Any) -> Any:
    """Return the response with the counts of the chat completion it was converted from, if any."""
    counts = getattr(chat_response.usage, FIELD, None)
    if counts is None or response.usage is None:
        return response
    usage = VisualUsage(**response.usage.model_dump(exclude_unset=True), **{FIELD: counts})
    return VisualMessagesResponse(**{**dict(response), "usage": usage})


async def converted_stream(
    convert: Callable[[AsyncIterator[str]], AsyncIterator[str]], chat_events: AsyncIterator[str]
) -> AsyncIterator[str]:
    """Convert a stream of chat completion events; its first and last usage get the counts.

    Args:
        convert: vLLM's converter.
        chat_events: server-sent events, whose usage has the counts if the request has pictures.

    """
    counts: Any = None

    async def read() -> AsyncIterator[str]:
        nonlocal counts
        async for event in chat_events:
            # Every event has the same counts.
            if counts is None and f'"{FIELD}":' in event and event.startswith(_CHAT_EVENT):
                usage = json.loads(event.removeprefix(_CHAT_EVENT)).get("usage") or {}
                counts = usage.get(FIELD)
            _raise_if_a_selector_failed(event)
            yield event

    async for event in convert(read()):
        if counts is not None and event.startswith(_WITH_USAGE):
            event = event_with_counts(event, counts)
        yield event


def _raise_if_a_selector_failed(event: str) -> None:
    """Raise the error of such an event, whose message the converter then sends.

    vLLM's converter before 0.33 takes no error events, and sends what pydantic says about them.
    """
    if event.startswith(_CHAT_ERROR):
        message = json.loads(event.removeprefix(_CHAT_EVENT))["error"]["message"]
        if message.startswith(f"{SELECTOR}: "):
            raise GenerationError(message)
