# SPDX-License-Identifier: Apache-2.0
"""A model that takes images as vision chunks, over HTTP: clients send and see images."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from testing.photo import data_url, photo
from testing.tiny.table.server import TableServer
from tests.engine.test_server import Client, text_of

pytestmark = pytest.mark.slow

TOKENS = 48


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--plugins", "flashvlm")
    with TableServer("KimiK25ForConditionalGeneration", options, log=log) as server:
        yield Client(server)


def messages(*parts: dict[str, Any]) -> list[Any]:
    """Return a message with an image for each part: its settings."""
    urls = [data_url(photo(name).resize((224, 168))) for name in ("astronaut", "cat")]
    images = [
        {"type": "image_url", "image_url": {"url": url}, **own}
        for url, own in zip(urls, parts, strict=False)
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}]


def kept(answer: Any) -> list[int]:
    return [each["kept"] for each in answer.usage.visual_tokens["images"]]


def test_the_usage_counts_images(client: Client) -> None:
    whole = client.ask(messages=messages({}))
    half = client.ask(messages=messages({}), visual_budget=0.5)
    assert whole.usage.visual_tokens == {
        "total": TOKENS,
        "kept": TOKENS,
        "images": [{"total": TOKENS, "kept": TOKENS}],
    }
    assert half.usage.visual_tokens == {
        "total": TOKENS,
        "kept": TOKENS // 2,
        "images": [{"total": TOKENS, "kept": TOKENS // 2}],
        "positions": "kept",
    }
    assert whole.usage.prompt_tokens - half.usage.prompt_tokens == TOKENS // 2
    assert text_of(client.ask(messages=messages({}), visual_budget=TOKENS)) == text_of(whole)
    assert client.metric('flashvlm_visual_tokens_seen_total{modality="image"') == 3 * TOKENS


def test_an_image_has_the_budget_of_its_content_part(client: Client) -> None:
    several = messages({"visual_budget": 8}, {"visual_budget": 20})
    assert kept(client.ask(messages=several)) == [8, 20]
    mixed = messages({}, {"visual_budget": None})
    assert kept(client.ask(messages=mixed, visual_budget=10)) == [10, TOKENS]
    assert kept(client.ask(messages=messages({}, {}), visual_budget={"total": 30})) == [15, 15]


def test_a_selector_that_is_not_installed_is_refused_for_its_image(client: Client) -> None:
    asked = messages({}, {"visual_budget": 8, "visual_selector": "none such"})
    with pytest.raises(BadRequestError, match="none such"):
        client.ask(messages=asked)


def test_an_explained_item_is_an_image(client: Client) -> None:
    body = {"model": client.server.model, "messages": messages({}), "visual_budget": 12}
    answer = client.post("/v1/visual_tokens", body).json()
    (item,) = answer["items"]
    assert [item[name] for name in ("modality", "width", "height", "kept")] == [
        "image",
        224,
        168,
        12,
    ]
