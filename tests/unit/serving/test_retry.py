# SPDX-License-Identifier: Apache-2.0
"""When an answer is made again, and when not."""

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
    """Gives one outcome after the other: a stream's events, an exception, or an answer."""

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


async def made(outcomes: Sequence[Any], has_pixels: bool = True) -> tuple[Any, int]:
    handler = Handler(outcomes)
    answer = await retry_lost_pixels(handler, handler, lambda: has_pixels)
    if isinstance(answer, AsyncIterator):
        answer = [event async for event in answer]
    return answer, handler.calls


@pytest.mark.parametrize("misses", [0, 1, 2])
async def test_an_answer_is_made_up_to_three_times(misses: int) -> None:
    assert await made([MISS] * misses + ["answer"]) == ("answer", misses + 1)


async def test_then_the_client_is_told() -> None:
    with pytest.raises(GenerationError):
        await made([MISS] * 3)


@pytest.mark.parametrize(
    ("error", "has_pixels"),
    [(GenerationError("visual_selector: mine raised"), True), (MISS, False), (ValueError(), True)],
)
async def test_other_errors_are_passed_on(error: Exception, has_pixels: bool) -> None:
    handler = Handler([error])
    with pytest.raises(type(error)):
        await retry_lost_pixels(handler, handler, lambda: has_pixels)
    assert handler.calls == 1


@pytest.mark.parametrize("begun", [[], [ROLE], [ROLE, ROLE]])
@pytest.mark.parametrize("misses", [0, 1, 2])
async def test_a_stream_that_fails_before_its_first_word_is_begun_again(
    begun: list[str], misses: int
) -> None:
    whole = [ROLE, WORD, WORD, DONE]
    answer, calls = await made([[*begun, FAILED, DONE]] * misses + [whole])
    assert answer == whole
    assert calls == misses + 1


@pytest.mark.parametrize("end", [[DONE], [USAGE, DONE]])
async def test_where_vllm_hides_the_error_a_stream_that_ends_without_a_word_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, end: list[str]
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    whole = [ROLE, WORD, USAGE, DONE]
    assert await made([[ROLE, *end], whole]) == (whole, 2)
    assert await made([[ROLE, *end]] * 3) == ([ROLE, *end], 3)
    assert await made([[ROLE, *end]], has_pixels=False) == ([ROLE, *end], 1)
    error = object()
    assert await made([[ROLE, *end], error]) == ([end[0], DONE][: len(end)], 2)


async def test_a_stream_that_keeps_failing_ends_as_vllm_ends_it() -> None:
    assert await made([[ROLE, FAILED, DONE]] * 3) == ([ROLE, FAILED, DONE], 3)


async def test_after_the_first_word_nothing_is_made_again() -> None:
    assert await made([[ROLE, WORD, FAILED, DONE]]) == ([ROLE, WORD, FAILED, DONE], 1)


async def test_a_stream_without_pixels_is_passed_on() -> None:
    assert await made([[ROLE, FAILED, DONE]], has_pixels=False) == ([ROLE, FAILED, DONE], 1)


async def test_an_error_in_place_of_the_second_stream_ends_it_as_the_first_ended() -> None:
    assert await made([[ROLE, FAILED, DONE], "an error"]) == ([FAILED, DONE], 2)


async def test_a_stream_without_words_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.32.0")
    assert await made([[ROLE, DONE]]) == ([ROLE, DONE], 1)
