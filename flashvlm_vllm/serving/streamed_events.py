# SPDX-License-Identifier: Apache-2.0
"""Formats of the server-sent events in the streams of vLLM's chat handlers.

``create_chat_completion`` returns events of chat completions. Since 0.33 it returns events of
Anthropic's and Cohere's routes, too; before, vLLM converts them afterwards. Quotes in a model's
output are escaped in an event, so output cannot be taken for a field.
"""

import json
from typing import Any

DONE = "data: [DONE]\n\n"

_CHAT = "data: "
_ANTHROPIC = "event: "
_COHERE_START = '"type":"message-start"'

_BEFORE_TOKENS = ('"delta":{"role":', '"type":"message_start"', _COHERE_START)
_ERRORS = ('data: {"error"', "event: error\n", 'data: {"type": "message-end"')


def precedes_tokens(event: object) -> bool:
    """Return whether this is the event without a token that vLLM sends before the first one."""
    return isinstance(event, str) and any(field in event for field in _BEFORE_TOKENS)


def is_error(event: object, message: str) -> bool:
    """Return whether this event reports an error with that message."""
    return isinstance(event, str) and event.startswith(_ERRORS) and message in event


def end_of_stream(event: str) -> tuple[str, ...]:
    """Return the events that end a stream after this one: none in Anthropic's format."""
    return (DONE,) if event.startswith(_CHAT) and event != DONE else ()


def error_events(error: Exception, first: str, handler: Any) -> tuple[str, ...]:
    """Return the events that end a stream with an error, in the stream's format.

    Args:
        error: its message is sent.
        first: the first event of the stream, which the returned events replace.
        handler: the vLLM handler.

    """
    if first.startswith(_ANTHROPIC):
        body = {"type": "error", "error": {"type": "api_error", "message": str(error)}}
        return (f"event: error\ndata: {json.dumps(body)}\n\n",)
    if _COHERE_START in first:
        body = {"type": "message-end", "delta": {"error": str(error), "finish_reason": "ERROR"}}
        return (f"{_CHAT}{json.dumps(body)}\n\n", DONE)
    return (f"{_CHAT}{handler.create_streaming_error_response(error)}\n\n", DONE)
