# SPDX-License-Identifier: Apache-2.0
"""Which words guide the selection of each picture of a conversation."""

from typing import Any

import pytest

from flashvlm_vllm.request.question import UserTurn, query_from_messages
from flashvlm_vllm.request.steering import (
    Steering,
    item_queries,
    parse_steering,
    turns_of_messages,
    turns_of_prompt,
)

IMAGE = {"type": "image_url", "image_url": {"url": "http://x/a.png"}}
VIDEO = {"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}


def say(role: str, *parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return {"role": role, "content": content}


def of_messages(messages: list[Any], steering: Steering) -> dict[str, tuple[str, ...]]:
    return item_queries(turns_of_messages(messages), query_from_messages(messages), steering)


def of_prompt(prompt: str, turn: UserTurn) -> dict[str, tuple[str, ...]]:
    turns = turns_of_prompt(prompt, turn, PICTURE)
    return item_queries(turns, turn.words_of_latest(prompt), Steering.MESSAGE)


def test_pictures_of_earlier_messages_follow_their_own_words() -> None:
    messages = [
        say("user", IMAGE, "what is this?"),
        say("assistant", "a dog"),
        say("user", IMAGE, VIDEO, "and these?"),
        say("assistant", "cats"),
        say("user", "which is larger?"),
    ]
    assert of_messages(messages, Steering.MESSAGE) == {
        "image": ("what is this?", "which is larger?"),
        "video": ("which is larger?",),
    }
    assert of_messages(messages, Steering.LATEST) == {
        "image": ("which is larger?",) * 2,
        "video": ("which is larger?",),
    }
    assert of_messages(messages, Steering.OWN) == {
        "image": ("what is this?", "and these?"),
        "video": ("and these?",),
    }
    # A new picture: those of the message before go back to its words.
    messages += [say("assistant", "the cat"), say("user", IMAGE, "now?")]
    assert of_messages(messages, Steering.MESSAGE) == {
        "image": ("what is this?", "and these?", "now?"),
        "video": ("and these?",),
    }


def test_a_tools_picture_follows_its_own_text_or_the_user_message_before_it() -> None:
    messages = [
        say("user", "book a flight"),
        say("tool", IMAGE),
        say("tool", IMAGE, "page two"),
        say("tool", IMAGE),
    ]
    expected = ("book a flight", "page two", "book a flight")
    assert of_messages(messages, Steering.MESSAGE) == {"image": expected}


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "http://x/a.png"},
        {"type": "input_image", "image_url": "http://x/a.png"},
        {"type": "image_url", "image_url": None, "uuid": "a"},
        {"image_pil": None, "uuid": "a"},
        {"type": "image"},
    ],
)
def test_every_form_of_a_picture_is_one(part: dict[str, Any]) -> None:
    assert of_messages([say("user", part, "hi")], Steering.MESSAGE) == {"image": ("hi",)}


@pytest.mark.parametrize(
    "content",
    [
        "text",
        None,
        7,
        [None, 3],
        [{"type": "input_audio"}],
        [{"type": ["image_url"]}, {"type": {}}],
    ],
)
def test_a_message_without_pictures_has_none(content: object) -> None:
    assert of_messages([{"role": "user", "content": content}, None], Steering.MESSAGE) == {}


def test_a_picture_without_words_is_selected_by_saliency() -> None:
    assert of_messages([say("user", IMAGE)], Steering.MESSAGE) == {"image": ("",)}


def test_an_unknown_steering_names_the_known_ones() -> None:
    assert parse_steering(None) is None
    assert parse_steering("latest") is Steering.LATEST
    for value in ("first", 3, True):
        with pytest.raises(ValueError, match="'message' or 'latest' or 'own'; got"):
            parse_steering(value)


TURN = UserTurn("USER: ", "ASSISTANT:")
PICTURE = {"image": "<image>"}


def test_a_rendered_prompt_gives_the_same_words_as_its_messages() -> None:
    prompt = (
        "Be brief. USER: <image>\nwhat is this? ASSISTANT: a dog USER: <image><image>\nand these? "
        "ASSISTANT: cats USER: which is larger? ASSISTANT:"
    )
    assert of_prompt(prompt, TURN) == {
        "image": ("what is this?", "which is larger?", "which is larger?")
    }
    more = f"{prompt} the cat USER: <image>\nnow? ASSISTANT:"
    assert of_prompt(more, TURN)["image"][:3] == (
        "what is this?", "and these?", "and these?",
    )  # fmt: skip


@pytest.mark.parametrize("turn", [UserTurn(), UserTurn("<user>", "</user>")])
def test_a_prompt_without_turns_gives_no_words_of_items(turn: UserTurn) -> None:
    assert of_prompt("USER: <image> what? ASSISTANT:", turn) == {}
