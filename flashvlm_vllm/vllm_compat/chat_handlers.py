# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's chat handlers: adds counts to `usage` and retries requests with lost pixels."""

from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


async def _create_answer(
    original: Any, handler: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.serving import (
        request_context,
        request_log,
        retry,
        selector_failures,
        usage,
    )

    async def make() -> Any:
        return await original(handler, request, raw_request, *args, **kwargs)

    async def again() -> Any:
        with request_context.suppressed():
            return await make()

    with request_context.collecting() as collected:
        try:
            answer = await retry.retry_lost_pixels(make, again, lambda: bool(collected.counts))
            answer = await selector_failures.checked(answer, collected.fallible_items, handler)
        finally:
            request_log.log_request(request, raw_request, collected)
    return usage.annotated(answer, collected)


_WHY: Final = (
    "usage has no field for plugins, and vllm run-batch calls the handlers without a route. "
    "Requests are also retried here if their pixels were lost between vLLM's two pixel caches "
    "because another client disconnected; vLLM answers them with status 500."
)
_ENDS: Final = "Plugins can extend usage, and vLLM retries such requests itself."
_RECOVERY: Final = "https://github.com/vllm-project/vllm/pull/46747"

WRAPS: Final = tuple(
    Wrap(target, _WHY, "0.32", _ENDS, _RECOVERY, wrapper=_create_answer)
    for target in (
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
        "vllm.entrypoints.openai.chat_completion.batch_serving:"
        "OpenAIServingChatBatch.create_batch_chat_completion",
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.create_responses",
    )
)
