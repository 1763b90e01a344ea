# SPDX-License-Identifier: Apache-2.0
"""Pixels lost between vLLM's two caches of them are sent again."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.server import Server
from tests.engine import drop_mm_cache
from tests.engine.conftest import REPOSITORY
from tests.engine.test_messages import picture, user
from tests.engine.test_server import ARGUMENTS, QUESTION, Client, conversation, text_of

MISS = "Multi-modal cache miss"


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    options = (
        *("--plugins", "flashvlm", "--enable-scale-out"),
        *("--middleware", f"{drop_mm_cache.__name__}.{drop_mm_cache.DropCache.__name__}"),
    )
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"PYTHONPATH": str(REPOSITORY)}
    with Server(clip_llava, (*options, *ARGUMENTS), log=log, environment=environment) as server:
        yield Client(server)


def misses(client: Client) -> int:
    return client.server.log.count(MISS)


def drop_engine_cache(client: Client) -> None:
    assert client.post(drop_mm_cache.PATH, "").status_code == 200


@pytest.mark.parametrize("budget", [64, None])
def test_a_request_with_lost_pixels_is_retried(client: Client, budget: int | None) -> None:
    first = client.ask(visual_budget=budget)
    seen, before = client.metric("flashvlm_visual_tokens_seen_total"), misses(client)
    drop_engine_cache(client)
    again = client.ask(visual_budget=budget)
    assert text_of(again) == text_of(first)
    assert again.usage.visual_tokens == first.usage.visual_tokens
    assert misses(client) == before + 1
    # Generated twice, counted once.
    assert client.metric("flashvlm_visual_tokens_seen_total") - seen == 576


def test_a_stream_with_lost_pixels_is_retried(client: Client) -> None:
    first = text_of(client.ask(visual_budget=64))
    before = misses(client)
    drop_engine_cache(client)
    stream = client.openai.chat.completions.create(
        model=client.server.model,
        messages=conversation(),
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"visual_budget": 64},
    )
    chunks = list(stream)
    assert misses(client) == before + 1
    roles = [each.choices[0].delta.role for each in chunks if each.choices]
    assert [role for role in roles if role] == ["assistant"]
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == first
    assert chunks[-1].usage.visual_tokens["kept"] == 64


def test_batches_and_responses_with_lost_pixels_are_retried(client: Client) -> None:
    url = conversation()[0]["content"][0]["image_url"]["url"]
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions/batch": {"messages": [conversation(), conversation("a dog?")]},
        "/v1/responses": {"input": [{"role": "user", "content": parts}]},
    }
    for path, body in bodies.items():
        body |= {"model": client.server.model, "visual_budget": 32, "temperature": 0}
        limit = {"max_output_tokens": 4} if "input" in body else {"max_tokens": 4}
        first = client.post(path, {**body, **limit}).json()
        before = misses(client)
        drop_engine_cache(client)
        again = client.post(path, {**body, **limit})
        assert again.status_code == 200, path
        assert again.json()["usage"] == first["usage"]
        assert misses(client) > before


@pytest.mark.parametrize("stream", [False, True])
def test_messages_with_lost_pixels_are_retried(client: Client, stream: bool) -> None:
    body = {
        "model": client.server.model,
        "messages": [user(picture(), QUESTION)],
        "max_tokens": 4,
        "temperature": 0,
        "visual_budget": 32,
        "stream": stream,
    }
    first = client.post("/v1/messages", body)
    before = misses(client)
    drop_engine_cache(client)
    again = client.post("/v1/messages", body)
    assert misses(client) == before + 1
    assert outputs(again.text) == outputs(first.text) != []
    assert again.text.count('"visual_tokens":{"total":576,"kept":32') == (2 if stream else 1)


def outputs(response: str) -> list[str]:
    """Return the texts in a response of ``/v1/messages``, streamed or not."""
    return re.findall(r'"text":"((?:[^"\\]|\\.)+)"', response)
