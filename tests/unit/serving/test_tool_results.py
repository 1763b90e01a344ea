# SPDX-License-Identifier: Apache-2.0
"""Which words steer pictures of tool results in Anthropic's form. vLLM's own conversion is used."""

from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from flashvlm_vllm.request.question import query_from_messages
from flashvlm_vllm.request.steering import Steering, item_queries, turns_of_messages
from flashvlm_vllm.serving.request_models import VisualAnthropicMessagesRequest
from flashvlm_vllm.serving.sent_request import KeepSentRequest, keep_model
from flashvlm_vllm.serving.tool_results import with_own_pictures

PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def result(*content: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "1", "content": list(content)}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


async def queries(*messages: Any, sent: bool = True) -> tuple[str, ...]:
    """Return the words that steer each picture of a conversation, as a server determines them."""
    fields = {"model": "m", "max_tokens": 1, "messages": list(messages)}
    request = VisualAnthropicMessagesRequest.model_validate(fields)
    found: list[tuple[str, ...]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if sent:
            keep_model(request)
        chat: ChatCompletionRequest = AnthropicServingMessages.to_chat_completion_request(request)
        turns = with_own_pictures(chat, chat.messages)
        latest = query_from_messages(turns)
        found.append(item_queries(turns_of_messages(turns), latest, Steering.MESSAGE)["image"])

    scope = {"type": "http", "method": "POST", "headers": []}
    await KeepSentRequest(app)(scope, None, None)
    return found[0]


async def test_the_newest_pictures_follow_the_words_of_the_user() -> None:
    asked = (user(text("which?")), assistant("I look."), user(result(text("two"), PICTURE)))
    assert await queries(*asked) == ("which?",)
    # Without the rule, the message that vLLM makes of the picture is the latest of the user.
    assert await queries(*asked, sent=False) == ("",)


async def test_earlier_pictures_follow_the_words_of_their_tool_result() -> None:
    first, second = result(text("one"), PICTURE), result(text("two"), PICTURE, PICTURE)
    last = user(PICTURE, text("and this?"))
    assert await queries(user(text("which?")), user(first, second), assistant("ok"), last) == (
        *("one", "two", "two"),
        "and this?",
    )


async def test_without_words_they_follow_the_user_before() -> None:
    last = user(PICTURE, text("and this?"))
    asked = (user(text("which?")), user(result(PICTURE)), assistant("ok"), last)
    assert await queries(*asked) == ("which?", "and this?")


async def test_pictures_beside_a_tool_result_stay_in_their_order() -> None:
    later = user(PICTURE, text("and this?"))
    message = user(text("compare"), PICTURE, result(text("one"), PICTURE))
    # vLLM writes results before the rest of their message.
    assert await queries(message, assistant("ok"), later) == ("one", "compare", "and this?")
    assert await queries(user(PICTURE), assistant("ok"), later) == ("", "and this?")
