# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's handler of ``/v1/messages``: passes the counts of chat completions on."""

from collections.abc import AsyncIterator
from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap
from flashvlm_vllm.vllm_releases import converts_chunks


def _convert(original: Any, handler: Any, chat_response: Any) -> Any:
    from flashvlm_vllm.serving.messages_usage import with_counts

    return with_counts(original(handler, chat_response), chat_response)


def _convert_stream(original: Any, handler: Any, chat_events: AsyncIterator[Any]) -> Any:
    if converts_chunks(handler):
        return original(handler, chat_events)
    from flashvlm_vllm.serving.messages_usage import converted_stream

    return converted_stream(lambda events: original(handler, events), chat_events)


_WHY: Final = (
    "The handler answers with a chat completion, and copies only the fields of its usage that it "
    "knows."
)
_ENDS: Final = "Plugins can extend usage."

WRAPS: Final = tuple(
    Wrap(target, _WHY, "0.32", _ENDS, wrapper=wrapper)
    for target, wrapper in (
        (
            "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.messages_full_converter",
            _convert,
        ),
        (
            "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.message_stream_converter",
            _convert_stream,
        ),
    )
)
