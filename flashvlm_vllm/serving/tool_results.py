# SPDX-License-Identifier: Apache-2.0
"""Pictures of tool results in Anthropic's form.

vLLM converts a tool result with text and pictures to a message of the tool with the text, and one
of the user with only the pictures. The user did not write it: its missing words would be those of
the latest user message, and the pictures would not follow the words of their tool result.
"""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)

from flashvlm_vllm.request.question import words_of
from flashvlm_vllm.serving.sent_request import sent_model


def with_own_pictures(request: Any, messages: Sequence[Any]) -> Sequence[Any]:
    """Return the messages with each picture of a tool result in the message of that tool.

    Args:
        request: the request that vLLM renders.
        messages: its messages; the order of the pictures in them stays.

    Returns:
        ``messages``, unless the request was converted from Anthropic's form.

    """
    sent = sent_model(request)
    if not isinstance(sent, AnthropicMessagesRequest | AnthropicCountTokensRequest):
        return messages
    merged: list[Any] = []
    for message in messages:
        content = message.get("content")
        before = merged[-1] if merged else {}
        if (
            message.get("role") == "user"
            and before.get("role") == "tool"
            and content
            and not words_of(content)
        ):
            text = {"type": "text", "text": words_of(before.get("content"))}
            merged[-1] = {**before, "content": [text, *content]}
        else:
            merged.append(message)
    return merged
