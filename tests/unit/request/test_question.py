# SPDX-License-Identifier: Apache-2.0
import pytest

from flashvlm_vllm.request.question import UserTurn, query_from_messages, user_turn_of

IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_the_question_is_the_latest_user_message() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [IMAGE, text("what is it?")]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "which colour?"},
    ]
    assert query_from_messages(messages) == "which colour?"
    assert query_from_messages(messages[:3]) == "what is it?"


def test_text_parts_are_joined_and_a_message_without_text_is_empty() -> None:
    parts = [text(" left "), IMAGE, {"type": "input_text", "text": "dog"}]
    assert query_from_messages([{"role": "user", "content": parts}]) == "left dog"
    old_then_silent = [{"role": "user", "content": "old"}, {"role": "user", "content": [IMAGE]}]
    assert query_from_messages(old_then_silent) == ""
    assert query_from_messages([]) == ""


def vicuna(messages: list[dict[str, object]]) -> str:
    out = "A chat between a human and an assistant. "
    for message in messages:
        content = message["content"]
        words = content if isinstance(content, str) else content[0]["text"]  # type: ignore[index]
        out += f"USER: {words} " if message["role"] == "user" else f"ASSISTANT: {words}</s>"
    return out + "ASSISTANT:"


def test_the_text_around_a_turn_is_read_from_the_chat_template() -> None:
    turn = user_turn_of(vicuna)
    assert turn == UserTurn("USER: ", "ASSISTANT:")
    prompt = vicuna([{"role": "user", "content": "<image>\nwhat is left of the dog?"}])
    assert turn.words_of_latest(prompt) == "<image>\nwhat is left of the dog?"
    assert turn.words_of_latest("no template at all") == "no template at all"


@pytest.mark.parametrize("broken", [lambda messages: 1 / 0, lambda messages: "drops it"])
def test_with_an_unreadable_template_the_whole_prompt_is_the_question(broken: object) -> None:
    turn = user_turn_of(broken)  # type: ignore[arg-type]
    assert turn == UserTurn()
    assert turn.words_of_latest("USER: hello ASSISTANT:") == "USER: hello ASSISTANT:"
