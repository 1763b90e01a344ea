# SPDX-License-Identifier: Apache-2.0
"""Anthropic's Messages API (``/v1/messages``), called with the ``anthropic`` client."""

from typing import Any

import anthropic
import httpx
import pytest

from testing.photo import data_url, photo
from tests.engine.test_server import (
    ALLOWED,
    NOT_BUDGETS,
    QUESTION,
    URL,
    Client,
    client,  # noqa: F401  # a fixture
    text_of,
)

REFUSED = 'flashvlm_refusals_total{reason="bad_budget"}'


def picture(name: str = "astronaut", **more: Any) -> dict[str, Any]:
    """Return an image block."""
    media, _, data = data_url(photo(name)).removeprefix("data:").partition(";base64,")
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": media, "data": data},
        **more,
    }


def user(*content: Any) -> Any:
    texts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    return {"role": "user", "content": texts}


ASKED = [user(picture(), QUESTION)]


class Messages:
    """The ``anthropic`` client for one server, greedy with short answers."""

    def __init__(self, client: Client) -> None:  # noqa: F811
        self.url, self.model = client.server.url, client.server.model
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)

    def ask(self, messages: Any = ASKED, headers: Any = None, **extra: Any) -> Any:
        return self.anthropic.messages.create(**self._fields(messages, extra, headers))

    def stream(self, messages: Any = ASKED, **extra: Any) -> list[Any]:
        with self.anthropic.messages.stream(**self._fields(messages, extra, None)) as events:
            return [*events, events.get_final_message()]

    def count(self, messages: Any = ASKED, **extra: Any) -> int:
        counted = self.anthropic.messages.count_tokens(
            model=self.model, messages=messages, extra_body=extra
        )
        return counted.input_tokens

    def _fields(self, messages: Any, extra: Any, headers: Any) -> Any:
        body = {"temperature": 0, **extra}
        fields = {"model": self.model, "max_tokens": 8, "messages": messages}
        return {**fields, "extra_body": body, "extra_headers": headers}


@pytest.fixture
def messages(client: Client) -> Messages:  # noqa: F811
    return Messages(client)


def words(answer: Any) -> str:
    return "".join(block.text for block in answer.content)


def prompt_tokens(usage: Any) -> int:
    """Return the length of the prompt, which Anthropic's usage reports in three numbers."""
    return int(
        usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    )


def test_a_budget_shortens_the_prompt_and_the_usage_reports_it(
    client: Client,  # noqa: F811
    messages: Messages,
) -> None:
    whole = prompt_tokens(messages.ask().usage)
    for budget, kept in ((None, 576), (64, 64), (32, 32), (0.25, 144)):
        answer = messages.ask(visual_budget=budget)
        assert whole - prompt_tokens(answer.usage) == 576 - kept
        assert answer.usage.visual_tokens == {
            "total": 576,
            "kept": kept,
            "images": [{"total": 576, "kept": kept}],
            **({} if budget is None else {"positions": "kept"}),
        }
        # The same tokens stay as on the chat completions route.
        assert words(answer) == text_of(client.ask(visual_budget=budget))


def test_a_stream_reports_the_counts_with_its_first_and_last_usage(messages: Messages) -> None:
    *events, final = messages.stream(visual_budget=64)
    by_type = {event.type: event for event in events}
    counts = messages.ask(visual_budget=64).usage.visual_tokens
    assert counts["kept"] == 64
    assert by_type["message_start"].message.usage.visual_tokens == counts
    assert by_type["message_delta"].usage.visual_tokens == counts
    assert final.usage.visual_tokens == counts
    assert prompt_tokens(final.usage) == prompt_tokens(messages.ask(visual_budget=64).usage)
    assert words(final) == words(messages.ask(visual_budget=64))


def test_without_a_picture_the_usage_is_that_of_stock(messages: Messages) -> None:
    answer = messages.ask([user("hello")], visual_budget=64)
    assert not hasattr(answer.usage, "visual_tokens")
    *_, final = messages.stream([user("hello")], visual_budget=64)
    assert not hasattr(final.usage, "visual_tokens")
    assert words(final) == words(answer)


def test_the_other_fields_and_metadata_have_their_effect(messages: Messages) -> None:
    own = messages.ask(visual_budget=64)
    by_metadata = messages.ask(metadata={"user_id": "someone", "visual_budget": "64"})
    assert words(by_metadata) == words(own)
    assert words(messages.ask(visual_budget=64, visual_query=QUESTION)) == words(own)
    assert words(messages.ask(visual_budget=64, visual_query="flag")) != words(own)
    closed = messages.ask(visual_budget=64, visual_positions="closed")
    assert closed.usage.visual_tokens["positions"] == "closed"
    uniform = messages.ask(visual_budget=64, visual_selector="uniform")
    assert words(uniform) != words(own)


@pytest.mark.parametrize("budget", NOT_BUDGETS, ids=repr)
def test_an_invalid_budget_is_refused_and_counted_once(
    client: Client,  # noqa: F811
    messages: Messages,
    budget: Any,
) -> None:
    before = client.metric(REFUSED)
    with pytest.raises(anthropic.BadRequestError) as error:
        messages.ask(visual_budget=budget)
    assert "visual_budget" in str(error.value)
    assert ALLOWED in str(error.value)
    with pytest.raises(anthropic.BadRequestError, match="visual_budget"):
        messages.count(visual_budget=budget)
    assert client.metric(REFUSED) == before + 2


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"metadata": {"visual_budget": "many"}}, "metadata.visual_budget"),
        ({"visual_budget": 64, "visual_selector": "nobody"}, "visual_selector"),
        ({"visual_budget": 64, "visual_steering": "nobody"}, "visual_steering"),
    ],
)
def test_a_refusal_of_the_handler_has_the_form_of_the_api(
    messages: Messages, extra: dict[str, Any], field: str
) -> None:
    for send in (messages.ask, messages.stream):
        with pytest.raises(anthropic.BadRequestError, match=field):
            send(**extra)
    answer = httpx.post(
        f"{messages.url}/v1/messages",
        json={"model": messages.model, "max_tokens": 4, "messages": ASKED, "metadata": {}}
        | {"visual_budget": 64, "visual_selector": "nobody"},
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert "known: flashvlm" in answer.json()["error"]["message"]


def test_counting_tokens_counts_the_pruned_prompt(messages: Messages) -> None:
    asked = [user(picture("cat"), "a question that was not asked before")]
    whole, pruned = messages.count(asked), messages.count(asked, visual_budget=64)
    assert whole - pruned == 512
    # Counting does not send the picture to the engine; the request that follows does.
    usage = messages.ask(asked, visual_budget=64).usage
    assert prompt_tokens(usage) == pruned
    assert usage.visual_tokens["kept"] == 64


def looked(result: str) -> list[Any]:
    """Return a conversation in which a tool returns a picture with the words ``result``."""
    use = {"type": "tool_use", "id": "call-1", "name": "look", "input": {}}
    content = [{"type": "text", "text": result}, picture()]
    answered = {"type": "tool_result", "tool_use_id": "call-1", "content": content}
    return [user(QUESTION), {"role": "assistant", "content": [use]}, user(answered)]


def test_a_picture_of_a_tool_follows_the_user_and_later_the_words_of_its_result(
    messages: Messages,
) -> None:
    def ask(conversation: list[Any], **extra: Any) -> str:
        return words(messages.ask(conversation, visual_budget=64, **extra))

    asked = looked("the rocket")
    own = ask(asked)
    assert own == ask(asked, visual_query=QUESTION)
    assert own != ask(asked, visual_query="")
    # After another picture it follows the words beside it, and not the latest question.
    later = [*asked, {"role": "assistant", "content": "yes"}, user(picture("cat"), "a cat?")]
    steered = messages.ask(later, visual_budget=64)
    assert words(steered) != ask(later, visual_steering="latest")
    assert steered.usage.visual_tokens["images"] == [{"total": 576, "kept": 64}] * 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"messages": [user(picture(visual_budget=64), QUESTION)]},
            "messages.0.content.0.visual_budget",
        ),
        (
            {
                "messages": [
                    user({"type": "tool_result", "tool_use_id": "1", "content": [
                        picture(visual_budget=64)
                    ]})
                ]
            },
            "messages.0.content.0.content.0.visual_budget",
        ),
        ({"extra_body": {"visual_budget": 64}}, "extra_body.visual_budget"),
    ],
)  # fmt: skip
def test_a_field_that_would_be_dropped_is_refused(
    client: Client,  # noqa: F811
    fields: dict[str, Any],
    named: str,
) -> None:
    count = 'flashvlm_refusals_total{reason="wrong_route"}'
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"):
        before = client.metric(count)
        body = {"model": client.server.model, "max_tokens": 4, "messages": ASKED, **fields}
        answer = client.post(path, body)
        assert answer.status_code == 400, path
        assert f"{named}: it has no effect on {path}; set visual_budget in" in answer.text
        assert client.metric(count) == before + 1


def test_openapi_describes_the_fields(client: Client) -> None:  # noqa: F811
    api = httpx.get(f"{client.server.url}/openapi.json", timeout=30).json()
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"):
        body = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        model = api["components"]["schemas"][body["schema"]["$ref"].rsplit("/", 1)[1]]
        field = model["properties"]["visual_budget"]
        kinds = ["integer", "number", "object", "string", "null"]
        assert [one["type"] for one in field["anyOf"]] == kinds
        assert "visual_steering" in model["properties"]


def test_the_url_of_a_picture_is_that_of_the_openai_form() -> None:
    """The tests above compare answers of both routes about the same picture."""
    source = picture()["source"]
    assert f"data:{source['media_type']};base64,{source['data']}" == URL
