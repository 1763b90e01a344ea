# SPDX-License-Identifier: Apache-2.0
"""Every route of vLLM that takes chats or pictures: a budget has its effect there or is refused.

`test_no_route_is_missing` fails when a vLLM release adds a route: decide what it does with a
budget, and add it here and to the table in docs/users/request.md.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import vllm

from flashvlm_vllm.vllm_releases import release_of
from testing.server import Server
from tests.engine.conftest import REPOSITORY
from tests.engine.test_messages import ASKED
from tests.engine.test_server import (
    ALLOWED,
    QUESTION,
    URL,
    Client,
    client,  # noqa: F401  # a fixture
    conversation,
)

HEADER = "X-Visual-Budget"
BAD = 'flashvlm_refusals_total{reason="bad_budget"}'
WRONG = 'flashvlm_refusals_total{reason="wrong_route"}'

CHAT = {"messages": conversation(), "max_tokens": 4, "temperature": 0}
MESSAGES = {"messages": ASKED, "max_tokens": 4, "temperature": 0}
INPUT = {
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": URL, "detail": "auto"},
                {"type": "input_text", "text": QUESTION},
            ],
        }
    ],
    "max_output_tokens": 4,
}


def rendered(answer: Any) -> int:
    return len(answer["token_ids"])


def of_usage(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens"])


def of_messages(answer: Any) -> int:
    usage = answer["usage"]
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"]) + int(
        usage["cache_creation_input_tokens"]
    )


TAKING: dict[str, tuple[dict[str, Any], Callable[[Any], int]]] = {
    "/v1/chat/completions": (CHAT, of_usage),
    "/v1/chat/completions/batch": ({**CHAT, "messages": [CHAT["messages"]]}, of_usage),
    "/v1/chat/completions/render": (CHAT, rendered),
    "/v1/responses": (INPUT, lambda answer: answer["usage"]["input_tokens"]),
    "/v1/responses/render": (INPUT, rendered),
    "/v1/messages": (MESSAGES, of_messages),
    "/v1/messages/count_tokens": ({"messages": ASKED}, lambda answer: answer["input_tokens"]),
    "/v1/messages/render": (MESSAGES, rendered),
    "/invocations": (CHAT, of_usage),
    "/tokenize": ({"messages": CHAT["messages"]}, lambda answer: answer["count"]),
}
"""Routes on which fields and header have their effect: a request, and the length of its prompt."""
EXPLAIN = "/v1/visual_tokens"
"""Likewise, but without a budget there is nothing to explain."""
STRUCTURED = "/v1/systemone"
HAS_STRUCTURED = release_of(vllm.__version__) != (0, 31)
"""vLLM has this route since 0.32."""
REFUSING = (STRUCTURED, "/inference/v1/generate")
HEADER_ONLY = ("/cohere/v2/chat", "/cohere/v2/chat/render")
"""With VLLM_ENABLE_COHERE_API=1 and the package cohere, which is not installed here.
`tests/unit/serving/test_routes.py` has them, and /classify, which needs another model."""
POOLING = (
    *("/pooling", "/classify", "/v1/embeddings", "/v2/embed"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
WITHOUT_PICTURES = {
    *("/v1/completions", "/v1/completions/render", "/generative_scoring"),
    *("/detokenize", "/ping", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
    *("/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests"),
    *("/v1/chat/completions/derender", "/v1/completions/derender"),
    "/v1/decisions",  # since 0.33; it refuses unknown fields itself
    *("/v1/chat/completions/derender/stream", "/v1/completions/derender/stream"),
}


def post(client: Client, path: str, body: Any, *header: str) -> httpx.Response:  # noqa: F811
    return httpx.post(
        client.server.url + path,
        json={"model": client.server.model, **body},
        headers=[(HEADER, value) for value in header],
        timeout=120,
    )


@pytest.fixture(scope="module")
def pooling(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The same model as a server of embeddings."""
    log = tmp_path_factory.mktemp("pooling") / "log"
    options = ("--runner", "pooling", "--convert", "embed", "--max-model-len", "4096")
    with Server(clip_llava, ("--plugins", "flashvlm", *options), log=log) as server:
        yield Client(server)


def posts(client: Client) -> set[str]:  # noqa: F811
    """Return the paths of a server's POST routes."""
    paths = httpx.get(f"{client.server.url}/openapi.json", timeout=60).json()["paths"]
    return {path for path, methods in paths.items() if "post" in methods}


def test_no_route_is_missing(client: Client, pooling: Client) -> None:  # noqa: F811
    missing = set() if HAS_STRUCTURED else {STRUCTURED}
    taking = {*TAKING, EXPLAIN, *REFUSING} - missing
    assert posts(client) - WITHOUT_PICTURES == taking
    others = {"/invocations", "/tokenize", STRUCTURED} - missing
    assert posts(pooling) - WITHOUT_PICTURES - {*POOLING} == others


def test_the_page_lists_the_routes() -> None:
    page = (REPOSITORY / "docs" / "users" / "request.md").read_text()
    _, _, section = page.partition("## Routes\n")
    listed = set(re.findall(r"`(/[^`]+)`", section.partition("\n## ")[0]))
    assert {*TAKING, EXPLAIN, *REFUSING, *HEADER_ONLY, *POOLING} <= listed


@pytest.mark.parametrize("path", TAKING)
def test_field_and_header_have_the_same_effect_and_the_field_wins(
    client: Client,  # noqa: F811
    path: str,
) -> None:
    body, length = TAKING[path]

    def tokens(*header: str, **fields: Any) -> int:
        answer = post(client, path, {**body, **fields}, *header)
        assert answer.status_code == 200, answer.text
        return length(answer.json())

    whole = tokens()
    assert whole - tokens(visual_budget=64) == 512
    assert whole - tokens("64") == 512
    assert whole - tokens("0.25") == 432
    assert whole == tokens("off") == tokens("null") == tokens("576")
    assert whole - tokens("32", visual_budget=64) == 512
    assert whole == tokens("32", visual_budget=None)


@pytest.mark.parametrize("path", [*TAKING, EXPLAIN])
@pytest.mark.parametrize(
    "values", [["many"], ["0"], ["1.5"], [""], ["6_4"], ["64, 64"], ["64", "64"], ["64", ""]]
)
def test_a_header_that_is_no_budget_is_refused_and_counted_once(
    client: Client,  # noqa: F811
    path: str,
    values: list[str],
) -> None:
    body = TAKING[path][0] if path in TAKING else CHAT
    before = client.metric(BAD)
    answer = post(client, path, body, *values)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"{HEADER}: ")
    assert (ALLOWED if len(values) == 1 else "allowed once; got it 2 times") in message
    assert client.metric(BAD) == before + 1
    if path.startswith("/v1/messages") and not path.endswith("render"):
        assert answer.json()["type"] == "error"
    else:
        assert answer.json()["error"]["param"] == HEADER


def test_metadata_takes_precedence_over_the_header(client: Client) -> None:  # noqa: F811
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        body, length = TAKING[path]
        whole = length(post(client, path, body).json())
        fields = {**body, "metadata": {"visual_budget": "64"}}
        assert whole - length(post(client, path, fields, "32").json()) == 512
        bad = post(client, path, {**body, "visual_budget": 64}, "many")
        assert bad.status_code == 400, "a client learns of a bad header at once"


def test_usage_reports_the_budget_of_the_header_in_streams_too(client: Client) -> None:  # noqa: F811
    headers = {HEADER: "64"}
    chat: Any = {"model": client.server.model, "messages": conversation(), "max_tokens": 4}
    one = client.openai.chat.completions.create(**chat, extra_headers=headers)
    assert one.usage.visual_tokens["kept"] == 64  # type: ignore[union-attr]
    *_, last = client.openai.chat.completions.create(
        **chat, extra_headers=headers, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.visual_tokens["kept"] == 64


def test_the_explain_route_reads_the_header(client: Client) -> None:  # noqa: F811
    assert post(client, EXPLAIN, CHAT).status_code == 400
    answer = post(client, EXPLAIN, CHAT, "64").json()
    assert (answer["visual_budget"], answer["kept"]) == (64, 64)


async def test_concurrent_requests_and_one_connection_keep_their_own_header(
    client: Client,  # noqa: F811
) -> None:
    async with httpx.AsyncClient(base_url=client.server.url, timeout=120) as http:

        async def kept(budget: int | None) -> int:
            headers = {} if budget is None else {HEADER: str(budget)}
            body = {"model": client.server.model, **CHAT}
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
            return int(answer.json()["usage"]["visual_tokens"]["kept"])

        budgets = [64, None, 32, 100, None, 7] * 2
        one_by_one = [await kept(budget) for budget in budgets]
        together = await asyncio.gather(*map(kept, budgets))
    assert one_by_one == list(together) == [budget or 576 for budget in budgets]


def test_requests_that_render_no_chat_ignore_the_header(client: Client) -> None:  # noqa: F811
    text = {"prompt": "hello", "max_tokens": 2, "temperature": 0}
    answers = [post(client, "/v1/completions", text, *header) for header in ([], ["64"], ["many"])]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    for path in ("/health", "/v1/models", "/metrics"):
        url = client.server.url + path
        assert httpx.get(url, headers={HEADER: "many"}, timeout=30).status_code == 200


def test_a_rendered_prompt_keeps_its_budget_and_takes_no_other(client: Client) -> None:  # noqa: F811
    body = {**CHAT, "visual_budget": 64}
    direct = post(client, "/v1/chat/completions", {**body, "return_token_ids": True}).json()
    prompt = post(client, "/v1/chat/completions/render", body).json()
    prompt["sampling_params"] = {"max_tokens": 4, "temperature": 0}
    generate = "/inference/v1/generate"
    # A proxy may pass a client's headers on to both routes.
    for header in ([], ["64"]):
        answer = post(client, generate, prompt, *header).json()
        assert answer["choices"][0]["token_ids"] == direct["choices"][0]["token_ids"]
    before = client.metric(WRONG)
    refused = post(client, generate, {**prompt, "visual_budget": 64})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "visual_budget"
    assert "the route that renders its prompt" in refused.text
    assert client.metric(WRONG) == before + 1


def test_structured_decisions_refuse_a_budget(client: Client) -> None:  # noqa: F811
    answer = post(client, STRUCTURED, {"state": "a", "questions": {}, "visual_budget": 64})
    assert answer.status_code == (400 if HAS_STRUCTURED else 404)
    refused = "visual_budget: it has no effect on /v1/systemone" in answer.text
    assert refused is HAS_STRUCTURED


@pytest.mark.parametrize("path", sorted({*POOLING, "/invocations"} - {"/classify"}))
def test_routes_of_a_server_of_embeddings_refuse_a_budget(pooling: Client, path: str) -> None:
    body = {"messages": conversation()}
    for fields, header, named in (
        ({"visual_budget": 64}, [], "visual_budget"),
        ({"visual_query": "a dog"}, [], "visual_query"),
        ({"metadata": {"visual_budget": "64"}}, [], "metadata.visual_budget"),
        ({}, ["64"], HEADER),
    ):
        answer = post(pooling, path, {**body, **fields}, *header)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == named
        assert f"{named}: it has no effect on {path}; only the server's default" in answer.text


def test_a_server_of_embeddings_answers_requests_without_a_budget(pooling: Client) -> None:
    answer = post(pooling, "/v1/embeddings", {"messages": conversation()})
    assert answer.json()["usage"]["prompt_tokens"] > 576
    assert httpx.get(f"{pooling.server.url}/flashvlm", timeout=30).status_code == 404
