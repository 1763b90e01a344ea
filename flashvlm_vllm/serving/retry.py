# SPDX-License-Identifier: Apache-2.0
"""Retries a request whose pixels are in the API process's cache but missing in the engine's.

The API process and the engine each have a cache of processed images, and an image is sent to the
engine once. If a client disconnects in between, the engine never receives its image, and vLLM
answers the next request with that image with status 500; its log recommends a retry. This module
does the retry, so that the disconnect of one client does not fail another client's request.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from vllm.exceptions import GenerationError

from flashvlm_vllm.serving.streamed_events import end_of_stream, is_error, precedes_tokens
from flashvlm_vllm.vllm_releases import ends_without_output

Make = Callable[[], Awaitable[Any]]

_RETRIES = 2
_MESSAGE = "Internal server error"
"""vLLM's error message for this case."""


async def retry_lost_pixels(make: Make, again: Make, has_pixels: Callable[[], bool]) -> Any:
    """Return a request's response; retry the request if its pixels were missing.

    Args:
        make: calls vLLM's handler.
        again: calls vLLM's handler again.
        has_pixels: returns whether the request has images or videos; others are not retried.

    """
    answer = await _made((make, *[again] * _RETRIES), has_pixels)
    return _streamed(answer, again, has_pixels) if isinstance(answer, AsyncIterator) else answer


async def _made(attempts: Sequence[Make], has_pixels: Callable[[], bool]) -> Any:
    *earlier, last = attempts
    for attempt in earlier:
        try:
            return await attempt()
        except GenerationError as error:
            if str(error) != _MESSAGE or not has_pixels():
                raise
    return await last()


async def _streamed(
    stream: AsyncIterator[Any], again: Make, has_pixels: Callable[[], bool]
) -> AsyncIterator[Any]:
    """Pass a stream on; restart it if it fails before its first token."""
    retries = _RETRIES if has_pixels() else 0
    while True:
        failure = None
        # Events that vLLM sends together with the first token; holding them adds no latency.
        held: list[Any] = []
        async for event in stream:
            if retries and (is_error(event, _MESSAGE) or ends_without_output(event)):
                failure = event
                break
            if retries and precedes_tokens(event):
                held.append(event)
                continue
            retries = 0
            for each in held:
                yield each
            held.clear()
            yield event
        if failure is None:
            for each in held:
                yield each
            return
        retries -= 1
        another = await again()
        if not isinstance(another, AsyncIterator):
            yield failure
            for each in end_of_stream(failure):
                yield each
            return
        stream = another
