# SPDX-License-Identifier: Apache-2.0
"""Makes a request again whose pixels the engine had not got, though the API process thought so.

Each of the two keeps a cache of processed images, and an image is sent once. A client that leaves
in between leaves the first with an image that the second never got, and vLLM answers
whoever asks for it next with 500 and a word in its log that a retry will do. Here that retry is
made, so that one client's leaving costs no other its answer.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from vllm.exceptions import GenerationError

from flashvlm_vllm.vllm_releases import ends_without_output

Make = Callable[[], Awaitable[Any]]

_RETRIES = 2
_MESSAGE = "Internal server error"
"""All that vLLM says of it outside its log."""
_DONE = "data: [DONE]\n\n"
_ROLE = '"delta":{"role":'


async def retry_lost_pixels(make: Make, again: Make, has_pixels: Callable[[], bool]) -> Any:
    """Return an answer, made again where its pixels were missing.

    Args:
        make: has a vLLM handler make the answer.
        again: makes it once more.
        has_pixels: tells whether the request has any; of others nothing can be missing.

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
    """Pass a stream on; one that fails before its first word is begun again."""
    retries = _RETRIES if has_pixels() else 0
    while True:
        failure = None
        # What vLLM sends at once with the first word, and so nothing that a client waits for.
        held: list[Any] = []
        async for event in stream:
            if retries and (_is_failure(event) or ends_without_output(event)):
                failure = event
                break
            if retries and isinstance(event, str) and _ROLE in event:
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
            if failure != _DONE:
                yield _DONE
            return
        stream = another


def _is_failure(event: Any) -> bool:
    return isinstance(event, str) and event.startswith('data: {"error"') and _MESSAGE in event
