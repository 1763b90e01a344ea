# SPDX-License-Identifier: Apache-2.0
"""Streams that vLLM 0.33 converts before its chat handler returns them: Anthropic's and Cohere's.

The events are copied from vLLM's converters. The engine tests of ``/v1/messages`` read them from a
server.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from vllm.exceptions import GenerationError

from flashvlm_vllm.request.budget import ItemCount
from flashvlm_vllm.serving import selector_failures
from flashvlm_vllm.serving.request_context import Collected
from flashvlm_vllm.serving.retry import retry_lost_pixels
from flashvlm_vllm.serving.streamed_events import error_events
from flashvlm_vllm.serving.usage import annotated

MISS = "Internal server error"


@dataclass(frozen=True)
class Format:
    """Events of a stream in the format of a route."""

    start: str
    token: str
    usage: str
    error: str
    end: tuple[str, ...]


def event(data: str, name: str | None = None) -> str:
    return f"{'' if name is None else f'event: {name}{chr(10)}'}data: {data}\n\n"


DONE = event("[DONE]")
CHAT = Format(
    event('{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'),
    event('{"id":"a","choices":[{"index":0,"delta":{"content":"cat"}}]}'),
    event('{"id":"a","choices":[],"usage":{"prompt_tokens":80}}'),
    event('{"error": {"message": "Internal server error", "code": 500}}'),
    (DONE,),
)
ANTHROPIC = Format(
    event(
        '{"type":"message_start","message":{"id":"a","usage":{"input_tokens":80}}}', "message_start"
    ),
    event(
        '{"type":"content_block_delta","delta":{"type":"text_delta","text":"cat"},"index":0}',
        "content_block_delta",
    ),
    event(
        '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":80}}',
        "message_delta",
    ),
    event(
        '{"type":"error","error":{"type":"api_error","message":"Internal server error"}}', "error"
    ),
    (),
)
COHERE = Format(
    event('{"id":"a","delta":{"message":{"role":"assistant"}},"type":"message-start"}'),
    event('{"index":0,"delta":{"message":{"content":{"text":"cat"}}},"type":"content-delta"}'),
    event('{"id":"a","delta":{"usage":{"tokens":{"input_tokens":80}}},"type":"message-end"}'),
    event(
        '{"type": "message-end", "delta": {"error": "Internal server error", '
        '"finish_reason": "ERROR"}}'
    ),
    (DONE,),
)
every_format = pytest.mark.parametrize(
    "form", [CHAT, ANTHROPIC, COHERE], ids=["chat", "anthropic", "cohere"]
)


async def streamed(events: Sequence[str]) -> AsyncIterator[str]:
    for each in events:
        yield each


async def retried(streams: Sequence[Any]) -> tuple[list[str], int]:
    """Return the events of a response that has pixels, and how many streams were asked for."""
    left = list(streams)

    async def make() -> Any:
        made = left.pop(0)
        return streamed(made) if isinstance(made, list) else made

    answer = await retry_lost_pixels(make, make, lambda: True)
    return [each async for each in answer], len(streams) - len(left)


@every_format
async def test_a_stream_that_fails_before_its_first_token_is_retried(form: Format) -> None:
    whole = [form.start, form.token, form.usage, *form.end]
    failed = [form.start, form.error, *form.end]
    assert await retried([failed, whole, whole]) == (whole, 2)
    assert await retried([failed] * 4) == (failed, 3)


@every_format
async def test_a_stream_with_a_token_or_another_error_is_not_retried(form: Format) -> None:
    late = [form.start, form.token, form.error, *form.end]
    assert await retried([late, late]) == (late, 1)
    other = [form.start, form.error.replace(MISS, "a selector failed"), *form.end]
    assert await retried([other, other]) == (other, 1)


@every_format
async def test_a_refusal_in_place_of_the_second_stream_ends_the_first_one(form: Format) -> None:
    failed = [form.start, form.error, *form.end]
    assert await retried([failed, "a refusal"]) == ([form.error, *form.end], 2)


class Handler:
    """vLLM's handler, as far as it writes an error of a chat completion."""

    engine_client = None

    def create_streaming_error_response(self, error: Exception) -> str:
        return json.dumps({"error": {"message": str(error)}})


@every_format
async def test_a_failed_selection_replaces_the_stream_by_an_error_in_its_format(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failures(*_: Any) -> dict[str, str]:
        return {"key": "visual_selector: mine raised"}

    monkeypatch.setattr(selector_failures, "find_selector_failures", failures)
    stream = streamed([form.start, form.token, form.usage, *form.end])
    answer = await selector_failures.checked(stream, ["key"], Handler())
    first, *rest = [each async for each in answer]
    assert rest == list(form.end)
    assert "visual_selector: mine raised" in first


def test_error_events_are_those_of_vllm() -> None:
    """Compared without spaces; vLLM's two routes write JSON with and without them."""
    for form in (ANTHROPIC, COHERE):
        written = error_events(GenerationError(MISS), form.start, Handler())
        assert [each.replace(" ", "") for each in written] == [
            each.replace(" ", "") for each in (form.error, *form.end)
        ]


async def test_counts_are_added_to_every_usage_that_has_a_place_for_them() -> None:
    collected = Collected(counts=[ItemCount(576, 64)])
    expected = {"total": 576, "kept": 64, "images": [{"total": 576, "kept": 64}]}
    for form, places in ((CHAT, 1), (ANTHROPIC, 2), (COHERE, 0)):
        whole = [form.start, form.token, form.usage, *form.end]
        written = [each async for each in annotated(streamed(whole), collected)]
        assert len(written) == len(whole)
        changed = [new for new, old in zip(written, whole, strict=True) if new != old]
        assert len(changed) == places
        for each in changed:
            data = json.loads(each.partition("data: ")[2])
            assert data.get("message", data)["usage"]["visual_tokens"] == expected
