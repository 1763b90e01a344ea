# SPDX-License-Identifier: Apache-2.0
"""The clients that people use, as they are installed: budgets, usage, streams, refusals.

The other tests of servers call with ``openai`` (test_server.py) and ``anthropic``
(test_messages.py); here both set the header, for programs in which only the client is configured.
"""

import os
from typing import Any

# Before it is imported: LiteLLM would fetch its list of prices from the internet.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import anthropic
import litellm
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI

from tests.engine.test_messages import ASKED, prompt_tokens
from tests.engine.test_server import (
    ALLOWED,
    Client,
    client,  # noqa: F401  # a fixture
    conversation,
    text_of,
)

HEADER = {"X-Visual-Budget": "64"}


def test_openai_with_the_header_set_once_for_all_requests(client: Client) -> None:  # noqa: F811
    own = openai.OpenAI(
        base_url=f"{client.server.url}/v1", api_key="none", max_retries=0, default_headers=HEADER
    )
    asked: Any = {"model": client.server.model, "messages": conversation(), "max_tokens": 8}
    answer = own.chat.completions.create(**asked, temperature=0)
    assert answer.usage.visual_tokens["kept"] == 64  # type: ignore[union-attr]
    assert text_of(answer) == text_of(client.ask(visual_budget=64))
    wider = own.chat.completions.create(**asked, extra_body={"visual_budget": 100})
    assert wider.usage.visual_tokens["kept"] == 100  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError, match="X-Visual-Budget") as error:
        own.chat.completions.create(**asked, extra_headers={"X-Visual-Budget": "many"})
    assert ALLOWED in str(error.value)


def test_anthropic_with_the_header_set_once_for_all_requests(client: Client) -> None:  # noqa: F811
    own = anthropic.Anthropic(
        base_url=client.server.url, api_key="none", max_retries=0, default_headers=HEADER
    )
    asked: Any = {"model": client.server.model, "messages": ASKED, "max_tokens": 8}
    answer = own.messages.create(**asked)
    assert answer.usage.visual_tokens["kept"] == 64  # type: ignore[attr-defined]
    counted = own.messages.count_tokens(model=client.server.model, messages=asked["messages"])
    assert counted.input_tokens == prompt_tokens(answer.usage)
    with own.messages.stream(**asked) as events:
        final: Any = events.get_final_message()
    assert final.usage.visual_tokens["kept"] == 64
    with pytest.raises(anthropic.BadRequestError, match="X-Visual-Budget") as error:
        own.messages.create(**asked, extra_headers={"X-Visual-Budget": "many"})
    assert ALLOWED in str(error.value)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_litellm(client: Client, provider: str) -> None:  # noqa: F811
    def ask(**more: Any) -> Any:
        return litellm.completion(
            model=f"{provider}/{client.server.model}",
            api_base=f"{client.server.url}/v1",
            api_key="none",
            messages=conversation(),
            max_tokens=8,
            temperature=0,
            num_retries=0,
            **more,
        )

    expected = client.ask(visual_budget=64)
    for given in (
        {"extra_body": {"visual_budget": 64}},
        {"visual_budget": 64},
        {"extra_headers": HEADER},
    ):
        answer = ask(**given)
        assert answer.usage.visual_tokens["kept"] == 64
        assert text_of(answer) == text_of(expected)
    chunks = list(
        ask(extra_body={"visual_budget": 64}, stream=True, stream_options={"include_usage": True})
    )
    # In streams LiteLLM drops usage fields that it does not know.
    assert chunks[-1].usage.prompt_tokens == expected.usage.prompt_tokens
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        text_of(expected)
    )
    for bad in (
        {"extra_body": {"visual_budget": 1.5}},
        {"extra_headers": {"X-Visual-Budget": "a"}},
    ):
        with pytest.raises(litellm.BadRequestError, match=r"(?i)visual.budget") as error:
            ask(**bad)
        assert ALLOWED in str(error.value)


def test_litellm_with_the_messages_route(client: Client) -> None:  # noqa: F811
    def ask(**more: Any) -> Any:
        return litellm.completion(
            model=f"anthropic/{client.server.model}",
            api_base=client.server.url,
            api_key="none",
            messages=conversation(),
            max_tokens=8,
            temperature=0,
            num_retries=0,
            **more,
        )

    whole = ask().usage.prompt_tokens
    for given in ({"visual_budget": 64}, {"extra_headers": HEADER}):
        answer = ask(**given)
        assert whole - answer.usage.prompt_tokens == 512
        assert text_of(answer) == text_of(client.ask(visual_budget=64))
    # For this provider LiteLLM sends extra_body as a field of that name, where nobody reads it.
    with pytest.raises(litellm.BadRequestError, match=r"extra_body\.visual_budget"):
        ask(extra_body={"visual_budget": 64})


def test_langchain_openai(client: Client) -> None:  # noqa: F811
    def chat(**more: Any) -> ChatOpenAI:
        return ChatOpenAI(
            base_url=f"{client.server.url}/v1",
            api_key="none",  # type: ignore[arg-type]
            model=client.server.model,
            max_tokens=8,  # type: ignore[call-arg]
            temperature=0,
            max_retries=0,
            **more,
        )

    expected = client.ask(visual_budget=64)
    for given in ({"extra_body": {"visual_budget": 64}}, {"default_headers": HEADER}):
        answer = chat(**given).invoke(conversation())
        assert answer.content == text_of(expected)
        assert answer.response_metadata["token_usage"]["visual_tokens"]["kept"] == 64
        chunks = list(chat(**given, stream_usage=True).stream(conversation()))
        assert "".join(str(chunk.content) for chunk in chunks) == text_of(expected)
        counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert counted[-1]["input_tokens"] == expected.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as error:
        chat(extra_body={"visual_budget": 1.5}).invoke(conversation())
    assert ALLOWED in str(error.value)


def test_langchain_anthropic(client: Client) -> None:  # noqa: F811
    def chat(**more: Any) -> ChatAnthropic:
        return ChatAnthropic(
            base_url=client.server.url,
            api_key="none",  # type: ignore[arg-type]
            model=client.server.model,
            max_tokens=8,  # type: ignore[call-arg]
            max_retries=0,
            **more,
        )

    def greedy(**extra: Any) -> ChatAnthropic:
        return chat(model_kwargs={"extra_body": {"temperature": 0, **extra}})

    expected = client.ask(visual_budget=64)
    answer = greedy(visual_budget=64).invoke(conversation())
    assert answer.content == text_of(expected)
    assert answer.response_metadata["usage"]["visual_tokens"]["kept"] == 64
    by_header = chat(default_headers=HEADER).invoke(conversation())
    assert by_header.response_metadata["usage"]["visual_tokens"]["kept"] == 64
    chunks = list(greedy(visual_budget=64).stream(conversation()))
    assert "".join(str(chunk.text) for chunk in chunks) == text_of(expected)
    counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert counted[-1]["input_tokens"] == expected.usage.prompt_tokens
    with pytest.raises(anthropic.BadRequestError) as error:
        greedy(visual_budget=1.5).invoke(conversation())
    assert ALLOWED in str(error.value)
