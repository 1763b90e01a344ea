# SPDX-License-Identifier: Apache-2.0
"""Budgets of content parts, totals, budgets that fit, and the server's limits."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import vllm
from openai import AsyncOpenAI, BadRequestError

from flashvlm_vllm.vllm_releases import release_of
from testing.photo import data_url, photo
from testing.server import Server
from testing.tiny.llava import build_llava
from tests.engine.conftest import REPOSITORY
from tests.engine.test_server import Client, text_of

CONTEXT = 1536
OPTIONS = ("--plugins", "flashvlm", "--max-model-len", str(CONTEXT))
URLS = [data_url(photo(name)) for name in ("astronaut", "coffee", "cat", "rocket")]


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("forms") / "log"
    with Server(clip_llava, (*OPTIONS, "--enable-prompt-tokens-details"), log=log) as server:
        yield Client(server)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with limits, and smaller budgets while requests wait; it runs one at a time.

    Its model is slower than the API process, which could not answer others otherwise.
    """
    model = build_llava(REPOSITORY / ".models" / "llava-slow", hidden=512, layers=12)
    options = (
        *("--visual-budget-min", "16", "--visual-budget-max", "0.5"),
        *("--visual-budget-under-load", "64:0", "--visual-budget-under-load", "32:3"),
        *("--max-num-seqs", "1"),
    )
    log = tmp_path_factory.mktemp("limited") / "log"
    with Server(model, (*OPTIONS, *options), log=log) as server:
        yield Client(server)


def pictures(*own: dict[str, Any], question: str = "what color is it?") -> list[Any]:
    """A message with one picture per argument, the fields of its content part."""
    parts = [
        {"type": "image_url", "image_url": {"url": url}, **fields}
        for url, fields in zip(URLS, own, strict=False)
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def kept(answer: Any) -> list[int]:
    return [each["kept"] for each in answer.usage.visual_tokens["images"]]


def labelled(client: Client, name: str, label: str) -> float:
    page = httpx.get(f"{client.server.url}/metrics", timeout=30).text
    lines = [line for line in page.splitlines() if line.startswith(name) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_content_part_has_its_own_budget_question_and_selector(client: Client) -> None:
    own = {"visual_budget": 8, "visual_query": "a cup", "visual_selector": "uniform"}
    messages = pictures(own, {"visual_budget": None}, {})
    assert kept(client.ask(messages=messages, visual_budget=32)) == [8, 576, 32]
    assert kept(client.ask(messages=messages)) == [8, 576, 576]
    assert kept(client.ask(messages=messages, visual_budget=None)) == [8, 576, 576]
    # The part's words and selector choose other tokens than the request's.
    answers = [
        client.ask(messages=pictures(fields), visual_budget=8)
        for fields in ({}, {"visual_query": "a flag"}, {"visual_selector": "divprune"})
    ]
    texts = [text_of(each) for each in answers]
    same = client.ask(messages=pictures({}), visual_budget=8, visual_query="a flag")
    assert text_of(same) == texts[1]
    same = client.ask(messages=pictures({}), visual_budget=8, visual_selector="divprune")
    assert text_of(same) == texts[2]
    assert len(set(texts)) == 3


def test_a_part_that_is_kept_whole_equals_an_image_without_a_budget(client: Client) -> None:
    """Its tokens come from vLLM's own encoder call, and its KV blocks match those of stock."""
    salt = {"cache_salt": "whole part"}
    whole = client.ask(messages=pictures({}), **salt)
    beside = client.ask(messages=pictures({}, {"visual_budget": 8}), **salt)
    # The first picture and the text before it: 4 blocks of 128.
    assert beside.usage.prompt_tokens_details.cached_tokens == 512
    assert kept(beside) == [576, 8]
    assert whole.usage.visual_tokens == {
        "total": 576,
        "kept": 576,
        "images": [{"total": 576, "kept": 576}],
    }


@pytest.mark.parametrize("total", [4, 7, 64, 90, 2303, 2304, 10**9])
def test_a_total_is_exact(client: Client, total: int) -> None:
    messages = pictures({}, {}, {}, {})
    if total < 1400:
        answer = client.ask(messages=messages, visual_budget={"total": total})
        assert sum(kept(answer)) == total
        assert max(kept(answer)) - min(kept(answer)) <= 1
    else:
        with pytest.raises(BadRequestError, match="1536"):
            client.ask(messages=messages, visual_budget={"total": total})


def test_a_total_is_for_the_pictures_without_a_budget_of_their_own(client: Client) -> None:
    answer = client.ask(messages=pictures({"visual_budget": 5}, {}, {}), visual_budget={"total": 9})
    assert sorted(kept(answer)) == [4, 5, 5]
    answer = client.ask(messages=pictures({}, {}), metadata={"visual_budget": '{"total": 9}'})
    assert sum(kept(answer)) == 9


def test_fit_serves_what_stock_refuses(client: Client) -> None:
    messages = pictures({}, {}, {}, {})
    with pytest.raises(BadRequestError):
        client.ask(messages=messages)
    answer = client.ask(messages=messages, visual_budget="fit")  # max_tokens is 8
    unused = CONTEXT - 8 - answer.usage.prompt_tokens
    assert 0 <= unused < 4
    assert len(set(kept(answer))) == 1
    # Without a limit a quarter of the context is for the answer.
    body = {"model": client.server.model, "messages": messages, "visual_budget": "fit"}
    response = client.post("/tokenize", body).json()
    assert 0 <= CONTEXT * 3 // 4 - response["count"] < 4


def test_fit_changes_nothing_where_the_prompt_fits(client: Client) -> None:
    for messages in (pictures({}), pictures({}, {})):
        whole, fit = (
            client.ask(messages=messages),
            client.ask(messages=messages, visual_budget="fit"),
        )
        assert kept(fit) == kept(whole)
        assert text_of(fit) == text_of(whole)
        assert fit.usage.visual_tokens == whole.usage.visual_tokens
        # The same identities and KV blocks.
        assert fit.usage.prompt_tokens_details.cached_tokens == (
            fit.usage.prompt_tokens // 128 * 128
        )


@pytest.mark.parametrize(
    ("fields", "own", "message"),
    [
        ({"visual_budget": {"total": 3}}, {}, "smallest total is 4"),
        ({"visual_budget": {"total": 0}}, {}, "1 token or more"),
        ({"visual_budget": {"all": 3}}, {}, "all images and videos of the request together"),
        ({"visual_budget": "fits"}, {}, '"fit" for as many tokens as'),
        ({}, {"visual_budget": "fit"}, "visual_budget of image 0"),
        ({}, {"visual_budget": 1.5}, "visual_budget of image 0"),
        ({}, {"visual_selector": "nothing"}, "known: flashvlm, "),
        ({"visual_steering": "newest"}, {}, "'message' or 'latest'"),
    ],
)
def test_bad_forms_are_refused(
    client: Client, fields: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.ask(messages=pictures(own, {}, {}, {}), **fields)
    assert message in str(caught.value)


def test_fit_is_refused_where_one_token_each_does_not_fit(client: Client) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.openai.chat.completions.create(
            model=client.server.model,
            messages=pictures({}, {}, {}),
            max_tokens=CONTEXT - 10,
            extra_body={"visual_budget": "fit"},
        )
    assert str(CONTEXT) in str(caught.value)
    # vLLM 0.31 itself refuses a text and an answer that are too long, before the images are read.
    ours = release_of(vllm.__version__) != (0, 31)
    assert ("visual_budget" in str(caught.value)) is ours
    assert client.metric('flashvlm_refusals_total{reason="does_not_fit"}') == int(ours)


def test_parts_of_the_responses_route_have_budgets(client: Client) -> None:
    content = [
        {"type": "input_image", "image_url": URLS[0], "detail": "auto", "visual_budget": 8},
        {"type": "input_image", "image_url": URLS[1], "detail": "auto"},
        {"type": "input_text", "text": "what is this?"},
    ]
    response = client.openai.responses.create(
        model=client.server.model,
        input=[{"role": "user", "content": content}],
        max_output_tokens=8,
        extra_body={"visual_budget": 16},
    )
    assert [each["kept"] for each in response.usage.visual_tokens["images"]] == [8, 16]


def test_an_image_named_by_its_uuid_alone_is_answered_for_another_question(client: Client) -> None:
    def ask(question: str, *, only_uuid: bool, **fields: Any) -> Any:
        messages = pictures({"uuid": "a picture"}, question=question)
        if only_uuid:
            messages[0]["content"][0]["image_url"] = None
        return client.ask(messages=messages, cache_salt=str(only_uuid), **fields)

    ask("what is it?", only_uuid=False, visual_budget=64)
    for question in ("is it red?", "is it large?"):
        for fields in ({"visual_budget": 64}, {"visual_budget": 20}, {}):
            found = ask(question, only_uuid=True, **fields)
            assert text_of(found) == text_of(ask(question, only_uuid=False, **fields))
    messages = pictures({"uuid": "never sent", "image_url": None})
    for fields in ({"visual_budget": 64}, {}):
        with pytest.raises(BadRequestError, match="data is not provided"):
            client.ask(messages=messages, **fields)


def test_limits_replace_what_a_client_asks_for_and_usage_says_so(limited: Client) -> None:
    def items(**fields: Any) -> Any:
        answer = limited.ask(messages=pictures({}), **fields)
        return answer.usage.visual_tokens["images"]

    assert items(visual_budget=1) == [{"total": 576, "kept": 16, "clamped": "min"}]
    assert items(visual_budget=400) == [{"total": 576, "kept": 288, "clamped": "max"}]
    assert items(visual_budget=None) == [{"total": 576, "kept": 288, "clamped": "max"}]
    assert items(visual_budget=100) == [{"total": 576, "kept": 100}]
    part = limited.ask(messages=pictures({"visual_budget": 1}, {"visual_budget": 20}))
    assert kept(part) == [16, 20]
    assert labelled(limited, "flashvlm_clamped_items_total", 'limit="min"') == 2


async def test_under_load_requests_without_a_budget_are_pruned(limited: Client) -> None:
    before = limited.ask(messages=pictures({}))
    assert kept(before) == [576] and "under_load" not in before.usage.visual_tokens
    openai = AsyncOpenAI(base_url=f"{limited.server.url}/v1", api_key="none", max_retries=0)

    def send(max_tokens: int, **extra: Any) -> asyncio.Task[Any]:
        completion = openai.chat.completions.create(
            model=limited.server.model,
            messages=pictures({}),
            max_tokens=max_tokens,
            extra_body=extra,
        )
        return asyncio.create_task(completion)

    async def reaches(metric: str, value: float) -> None:
        async with asyncio.timeout(120):
            while await asyncio.to_thread(limited.metric, metric) < value:
                await asyncio.sleep(0.05)

    # One runs at a time, until its client disconnects.
    busy = [send(1400, ignore_eos=True, visual_budget=16) for _ in range(12)]
    await reaches("vllm:num_requests_waiting{", 9)
    items = limited.metric("flashvlm_visual_items_total")
    asked = [send(4, **fields) for fields in ({}, {"visual_budget": None}, {"visual_budget": 100})]
    await reaches("flashvlm_visual_items_total", items + len(asked))
    for each in busy:
        each.cancel()
    default, null, number = await asyncio.gather(*asked)
    assert kept(default) == [32] and default.usage.visual_tokens["under_load"] is True
    assert kept(null) == [288] and "under_load" not in null.usage.visual_tokens
    assert kept(number) == [100] and "under_load" not in number.usage.visual_tokens
    assert labelled(limited, "flashvlm_visual_items_total", 'budget="under_load"') == 1
    assert kept(limited.ask(messages=pictures({}))) == [576]
