# SPDX-License-Identifier: Apache-2.0
"""When a response is generated again, and when it is not."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import vllm
from vllm.exceptions import GenerationError

from flashvlm_vllm.serving.retry import retry_lost_pixels

MISS = GenerationError("Internal server error")
ROLE = 'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
WORD = 'data: {"choices":[{"delta":{"content":"cat"}}]}\n\n'
FAILED = 'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
USAGE = 'data: {"choices":[],"usage":{"prompt_tokens":80,"completion_tokens":0}}\n\n'
DONE = "data: [DONE]\n\n"


class Handler:
    """Returns one outcome per call: a stream of events, an exception, or a response."""

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0

    async def __call__(self) -> Any:
        self.calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return self._stream(outcome) if isinstance(outcome, list) else outcome

    async def _stream(self, events: list[str]) -> AsyncIterator[str]:
        for event in events:
            yield event


async def result_and_calls(outcomes: Sequence[Any], has_pixels: bool = True) -> tuple[Any, int]:
    handler = Handler(outcomes)
    answer = await retry_lost_pixels(handler, handler, lambda: has_pixels)
    if isinstance(answer, AsyncIterator):
        answer = [event async for event in answer]
    return answer, handler.calls


@pytest.mark.parametrize("misses", [0, 1, 2])
async def test_a_response_is_generated_up_to_three_times(misses: int) -> None:
    assert await result_and_calls([MISS] * misses + ["answer"]) == ("answer", misses + 1)


async def test_after_three_failures_the_error_is_raised() -> None:
    with pytest.raises(GenerationError):
        await result_and_calls([MISS] * 3)


@pytest.mark.parametrize(
    ("error", "has_pixels"),
    [(GenerationError("visual_selector: mine raised"), True), (MISS, False), (ValueError(), True)],
)
async def test_other_errors_are_not_retried(error: Exception, has_pixels: bool) -> None:
    handler = Handler([error])
    with pytest.raises(type(error)):
        await retry_lost_pixels(handler, handler, lambda: has_pixels)
    assert handler.calls == 1


@pytest.mark.parametrize("begun", [[], [ROLE], [ROLE, ROLE]])
@pytest.mark.parametrize("misses", [0, 1, 2])
async def test_a_stream_that_fails_before_its_first_token_is_retried(
    begun: list[str], misses: int
) -> None:
    whole = [ROLE, WORD, WORD, DONE]
    answer, calls = await result_and_calls([[*begun, FAILED, DONE]] * misses + [whole])
    assert answer == whole
    assert calls == misses + 1


@pytest.mark.parametrize("end", [[DONE], [USAGE, DONE]])
async def test_a_stream_without_tokens_is_retried_if_vllm_hides_the_error(
    monkeypatch: pytest.MonkeyPatch, end: list[str]
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    whole = [ROLE, WORD, USAGE, DONE]
    assert await result_and_calls([[ROLE, *end], whole]) == (whole, 2)
    assert await result_and_calls([[ROLE, *end]] * 3) == ([ROLE, *end], 3)
    assert await result_and_calls([[ROLE, *end]], has_pixels=False) == ([ROLE, *end], 1)
    error = object()
    assert await result_and_calls([[ROLE, *end], error]) == ([end[0], DONE][: len(end)], 2)


async def test_a_stream_that_keeps_failing_ends_with_vllms_error() -> None:
    assert await result_and_calls([[ROLE, FAILED, DONE]] * 3) == ([ROLE, FAILED, DONE], 3)


async def test_after_the_first_token_nothing_is_retried() -> None:
    assert await result_and_calls([[ROLE, WORD, FAILED, DONE]]) == ([ROLE, WORD, FAILED, DONE], 1)


async def test_a_stream_without_pixels_is_not_retried() -> None:
    assert await result_and_calls([[ROLE, FAILED, DONE]], has_pixels=False) == (
        [ROLE, FAILED, DONE],
        1,
    )


async def test_an_error_in_place_of_the_second_stream_ends_the_first_stream() -> None:
    assert await result_and_calls([[ROLE, FAILED, DONE], "an error"]) == ([FAILED, DONE], 2)


async def test_a_stream_without_tokens_is_complete_if_vllm_reports_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.32.0")
    assert await result_and_calls([[ROLE, DONE]]) == ([ROLE, DONE], 1)
