# SPDX-License-Identifier: Apache-2.0
"""Settings in the content parts of images and videos."""

from typing import Any

import pytest

from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.parts import ItemSettings, item_settings, visual_parts
from flashvlm_vllm.request.steering import with_own_queries


def image(**own: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "http://x/a.png"}, **own}


def say(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


TEXT = {"type": "text", "text": "what is this?"}
VIDEO = {"type": "video_url", "video_url": {"url": "http://x/a.mp4"}}


def test_messages_without_settings_have_none() -> None:
    assert item_settings([say(image(), TEXT, VIDEO), "no message", {"role": "user"}]) == {}


def test_each_picture_has_its_own_settings_in_the_order_of_the_conversation() -> None:
    messages = [
        say(image(visual_budget=5), TEXT, image()),
        say(image(visual_budget=None, visual_query="a cat"), role="tool"),
        say({**VIDEO, "visual_selector": " uniform "}),
    ]
    assert item_settings(messages) == {
        "image": (
            ItemSettings(True, 5),
            ItemSettings(),
            ItemSettings(True, None, "a cat"),
        ),
        "video": (ItemSettings(selector="uniform"),),
    }


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"visual_budget": 0}, "visual_budget of image 1: a visual budget is a whole number"),
        ({"visual_budget": "64"}, "visual_budget of image 1"),
        ({"visual_budget": {"total": 9}}, "visual_budget of image 1"),
        ({"visual_budget": "fit"}, "visual_budget of image 1"),
        ({"visual_query": 5}, "visual_query of image 1"),
        ({"visual_selector": ""}, "visual_selector of image 1"),
    ],
)
def test_an_invalid_setting_names_its_image(own: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        item_settings([say(image(visual_budget=5), image(**own))])
    assert caught.value.field == next(iter(own))


@pytest.mark.parametrize("name", ["visual_budget", "visual_query", "visual_selector"])
def test_a_setting_of_a_part_that_is_no_picture_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match=r"type 'text'.*only parts that are images or videos"):
        item_settings([say({**TEXT, name: None})])


@pytest.mark.parametrize("content", [None, 5, "text", [5, None, "text"], [{"type": ["image"]}]])
def test_content_of_any_form_is_read(content: Any) -> None:
    assert list(visual_parts(content)) == []
    assert item_settings([{"role": "user", "content": content}]) == {}


def test_words_of_a_part_precede_those_of_its_message() -> None:
    queries = {"image": ("one", "two"), "video": ("three",)}
    items = {"image": (ItemSettings(), ItemSettings(query=""))}
    assert with_own_queries(queries, items) == {"image": ("one", ""), "video": ("three",)}
