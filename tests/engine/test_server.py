# SPDX-License-Identifier: Apache-2.0
"""Running servers, called over HTTP as by clients."""

import asyncio
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from flashvlm_vllm.cli import probe
from testing.photo import data_url, photo
from testing.server import Server

ARGUMENTS = ("--max-model-len", "4096", "--enable-prompt-tokens-details")
QUESTION = "what color is the suit?"
URL = data_url(photo("astronaut"))
ALLOWED = (
    "a whole number of tokens per image or video (1 or more), a fraction strictly between 0 and 1"
)


def conversation(question: str = QUESTION, url: str = URL, **image: Any) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": url}, **image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


class Client:
    """The ``openai`` client for one server, greedy with short answers."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(self, question: str = QUESTION, messages: Any = None, **extra: Any) -> Any:
        return self.openai.chat.completions.create(
            model=self.server.model,
            messages=conversation(question) if messages is None else messages,
            max_tokens=8,
            temperature=0,
            extra_body=extra,
        )

    def post(self, path: str, body: dict[str, Any] | str) -> httpx.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.server.url}{path}", content=text, headers=headers, timeout=120)

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.server.url}/metrics", timeout=30).text
        lines = [line for line in page.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--plugins", "flashvlm", "--enable-scale-out")
    with Server(clip_llava, (*options, *ARGUMENTS), log=log) as server:
        yield Client(server)


@pytest.fixture(scope="module")
def stock(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Stock vLLM: the plugin is installed, but not enabled."""
    log = tmp_path_factory.mktemp("stock") / "log"
    with Server(clip_llava, ARGUMENTS, log=log) as server:
        yield Client(server)


def test_the_prompt_is_shorter_with_a_budget_and_the_usage_reports_it(client: Client) -> None:
    answers = {budget: client.ask(visual_budget=budget) for budget in (None, 64, 32, 0.25)}
    whole = answers[None].usage.prompt_tokens
    for budget, kept in ((None, 576), (64, 64), (32, 32), (0.25, 144)):
        usage = answers[budget].usage
        assert whole - usage.prompt_tokens == 576 - kept
        assert usage.visual_tokens == {
            "total": 576,
            "kept": kept,
            "images": [{"total": 576, "kept": kept}],
            **({} if budget is None else {"positions": "kept"}),
        }
    assert len({text_of(answer) for answer in answers.values()}) == len(answers)


@pytest.mark.parametrize("extra", [{}, {"visual_budget": 576}, {"visual_budget": 10**30}])
def test_without_a_binding_budget_answers_equal_stock_vllm(
    client: Client, stock: Client, extra: dict[str, Any]
) -> None:
    def ids_and_logprobs(one: Client, **fields: Any) -> Any:
        answer = one.openai.chat.completions.create(
            model=one.server.model,
            messages=conversation("is there a rocket?"),
            max_tokens=16,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
            extra_body={"return_token_ids": True, "cache_salt": "fresh", **fields},
        )
        choice = answer.choices[0]
        logprobs = [
            [(entry.token, entry.logprob) for entry in token.top_logprobs]
            for token in choice.logprobs.content
        ]
        return answer.usage.prompt_tokens, choice.token_ids, logprobs

    assert ids_and_logprobs(client, **extra) == ids_and_logprobs(stock)


def test_without_the_plugin_enabled_the_server_is_stock_and_logs_how_to_enable_it(
    stock: Client,
) -> None:
    answer = stock.ask(visual_budget=64)
    assert answer.usage.prompt_tokens > 576
    assert not hasattr(answer.usage, "visual_tokens")
    hints = [line for line in stock.server.log.splitlines() if "--plugins flashvlm" in line]
    assert len(hints) == 1
    schema = httpx.get(f"{stock.server.url}/openapi.json", timeout=30).text
    assert "visual_budget" not in schema
    assert any("budget: ignored" in text for _, text in probe.answers(stock.server.url, None, 60))


async def test_concurrent_requests_get_the_results_of_their_own_budgets(client: Client) -> None:
    requests = [
        (f"{question} {number}", budget)
        for number in range(2)
        for question in (QUESTION, "where is the flag?")
        for budget in (None, 16, 64, 0.25)
    ]
    alone = [client.ask(question, visual_budget=budget) for question, budget in requests]
    server = client.server
    together = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answers = await asyncio.gather(
        *(
            together.chat.completions.create(
                model=server.model,
                messages=conversation(question),
                max_tokens=8,
                temperature=0,
                extra_body={"visual_budget": budget, "cache_salt": "together"},
            )
            for question, budget in requests
        )
    )
    for request, one, other in zip(requests, alone, answers, strict=True):
        assert one.usage.prompt_tokens == other.usage.prompt_tokens, request
        assert one.usage.visual_tokens == other.usage.visual_tokens, request
        assert text_of(one) == text_of(other), request


def test_a_uuid_does_not_hide_the_question_or_the_budget(client: Client) -> None:
    def ask(question: str, salt: str, budget: int = 64, **image: str) -> str:
        messages = conversation(question, **image)
        return text_of(client.ask(messages=messages, visual_budget=budget, cache_salt=salt))

    questions = ("is the sky blue?", "who is this?")
    plain = [ask(question, "plain") for question in questions]
    named = [ask(question, "named", uuid="photo-1") for question in questions]
    assert named == plain
    assert plain[0] != plain[1]
    assert ask(questions[0], "named", 65, uuid="photo-1") == ask(questions[0], "other", 65)


def test_an_image_sent_by_uuid_only_is_found_in_the_cache(client: Client) -> None:
    def ask(budget: int | None, *, only_uuid: bool) -> Any:
        messages = conversation("which one is it?", uuid="photo-2")
        if only_uuid:
            messages[0]["content"][0]["image_url"] = None
        return client.ask(messages=messages, visual_budget=budget)

    for budget, kept in ((None, 576), (576, 576), (64, 64)):
        first, again = ask(budget, only_uuid=False), ask(budget, only_uuid=True)
        assert text_of(again) == text_of(first)
        assert again.usage.visual_tokens["kept"] == kept


def test_the_same_question_again_hits_the_prefix_cache(client: Client) -> None:
    def cached(question: str) -> int:
        answer = client.ask(question, visual_budget=300, cache_salt="prefix")
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("what is he holding?") == 0
    assert cached("what is he holding?") >= 256
    assert cached("what is she holding?") == 0


def test_streaming_reports_the_usage_in_its_last_event(client: Client) -> None:
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
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(client.ask(visual_budget=64))
    assert chunks[-1].usage.visual_tokens["kept"] == 64


def test_a_request_chooses_positions(client: Client) -> None:
    kept, closed = (
        client.ask(visual_budget=64, visual_positions=each) for each in ("kept", "closed")
    )
    assert text_of(kept) != text_of(closed)
    assert kept.usage.prompt_tokens == closed.usage.prompt_tokens
    assert kept.usage.visual_tokens["positions"] == "kept"
    assert closed.usage.visual_tokens["positions"] == "closed"
    by_metadata = client.ask(metadata={"visual_budget": "64", "visual_positions": "closed"})
    assert text_of(by_metadata) == text_of(closed)
    assert text_of(client.ask(visual_budget=64, visual_positions=None)) == text_of(kept)
    # Without a budget positions do not apply.
    whole = client.ask(visual_positions="closed")
    assert text_of(whole) == text_of(client.ask())
    assert "positions" not in whole.usage.visual_tokens


@pytest.mark.parametrize("value", ["both", "KEPT", "", 1, True, ["kept"]])
@pytest.mark.parametrize("budget", [64, None])
def test_unknown_positions_are_refused_with_the_allowed_values(
    client: Client, value: Any, budget: int | None
) -> None:
    with pytest.raises(BadRequestError, match="'kept' or 'closed'") as error:
        client.ask(visual_budget=budget, visual_positions=value)
    assert "visual_positions" in str(error.value)
    if isinstance(value, str):
        with pytest.raises(BadRequestError, match="'kept' or 'closed'"):
            client.ask(metadata={"visual_budget": "64", "visual_positions": value})


def test_a_long_prompt_has_shortened_gaps_and_the_usage_reports_it(client: Client) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(photo(name))}}
        for name in ("astronaut", "cat", "coffee") * 3
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    stream = client.openai.chat.completions.create(
        model=client.server.model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"visual_budget": 16},
    )
    (*_, last) = stream
    assert last.usage.visual_tokens["positions"] == "shortened"
    closed = client.ask(messages=messages, visual_budget=16, visual_positions="closed")
    assert closed.usage.visual_tokens["positions"] == "closed"
    assert closed.usage.visual_tokens["kept"] == 9 * 16
    few = [{"role": "user", "content": [*parts[:3], {"type": "text", "text": QUESTION}]}]
    assert client.ask(messages=few, visual_budget=16).usage.visual_tokens["positions"] == "kept"


def test_the_responses_route_accepts_a_budget(client: Client) -> None:
    content = [
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]

    def respond(**fields: Any) -> Any:
        return client.openai.responses.create(
            model=client.server.model,
            input=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_output_tokens=8,
            temperature=0,
            **fields,
        )

    whole = respond()
    pruned = respond(extra_body={"visual_budget": 64})
    by_metadata = respond(metadata={"visual_budget": "64"})
    assert whole.usage.input_tokens - pruned.usage.input_tokens == 512
    assert pruned.usage.visual_tokens["kept"] == by_metadata.usage.visual_tokens["kept"] == 64
    events = list(respond(extra_body={"visual_budget": 64}, stream=True))
    assert events[-1].response.usage.visual_tokens["kept"] == 64


def test_the_batch_route_accepts_a_budget(client: Client) -> None:
    questions = ("is there a dog?", "is there a flag?")
    answer = client.post(
        "/v1/chat/completions/batch",
        {
            "model": client.server.model,
            "messages": [conversation(question) for question in questions],
            "visual_budget": 64,
            "max_tokens": 8,
            "temperature": 0,
        },
    ).json()
    alone = [text_of(client.ask(question, visual_budget=64)) for question in questions]
    assert [choice["message"]["content"] for choice in answer["choices"]] == alone
    assert answer["usage"]["visual_tokens"]["kept"] == 128


def test_metadata_and_visual_query_are_accepted(client: Client) -> None:
    assert client.ask(metadata={"visual_budget": "64"}).usage.visual_tokens["kept"] == 64
    assert client.ask(metadata={"visual_budget": "0.5"}).usage.visual_tokens["kept"] == 288
    own = text_of(client.ask(visual_budget=64))
    assert text_of(client.ask(visual_budget=64, visual_query=QUESTION)) == own
    assert text_of(client.ask(visual_budget=64, visual_query="flag")) != own


def test_a_request_without_an_image_is_answered_as_by_stock(client: Client, stock: Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = client.ask(messages=messages, visual_budget=64)
    assert text_of(answer) == text_of(stock.ask(messages=messages))
    assert not hasattr(answer.usage, "visual_tokens")


NOT_BUDGETS = [0, -3, 1.5, 64.0, "64", "", True, False, [64], [], {"tokens": 64}]


@pytest.mark.parametrize("budget", NOT_BUDGETS, ids=repr)
def test_an_invalid_budget_is_refused_and_the_server_continues(client: Client, budget: Any) -> None:
    with pytest.raises(BadRequestError) as error:
        client.ask(visual_budget=budget)
    assert "visual_budget" in str(error.value)
    assert ALLOWED in str(error.value)
    assert text_of(client.ask(visual_budget=64))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1.0", "-0.0"])
def test_invalid_numbers_are_refused(client: Client, number: str) -> None:
    body = json.dumps({"model": client.server.model, "messages": conversation(), "max_tokens": 4})
    answer = client.post("/v1/chat/completions", body[:-1] + f', "visual_budget": {number}}}')
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "visual_budget" in message
    expected = "say 1 to keep one token per image or video" if number == "1.0" else ALLOWED
    assert expected in message
    assert text_of(client.ask(visual_budget=64))


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"metadata": {"visual_budget": "many"}}, "metadata.visual_budget"),
        ({"metadata": {"visual_budget": 64}}, "metadata.visual_budget"),
        ({"visual_budget": 64, "visual_query": 5}, "visual_query"),
    ],
)
def test_other_invalid_fields_are_named_in_the_error(
    client: Client, extra: dict[str, Any], field: str
) -> None:
    with pytest.raises(BadRequestError, match=field):
        client.ask(**extra)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("extra", [{}, {"visual_budget": 64}])
def test_clients_may_still_not_pass_processor_arguments(
    client: Client, path: str, extra: dict[str, Any]
) -> None:
    messages = [conversation()] if path.endswith("batch") else conversation()
    for arguments in ({"visual_budget": 64}, {"size": {"height": 9999, "width": 9999}}):
        body = {"model": client.server.model, "messages": messages, "max_tokens": 4}
        answer = client.post(path, {**body, "mm_processor_kwargs": arguments, **extra})
        assert answer.status_code == 400
        assert "--trust-request-mm-kwargs" in answer.json()["error"]["message"]


def test_processor_arguments_are_refused_on_the_other_routes(client: Client) -> None:
    arguments = {"mm_processor_kwargs": {"visual_budget": 64}}
    respond = {"model": client.server.model, "input": "hello", **arguments}
    tokenize = {"model": client.server.model, "messages": conversation(), **arguments}
    for path, body in (
        ("/v1/responses", respond),
        ("/tokenize", tokenize),
        ("/invocations", tokenize),
        ("/v1/chat/completions/render", tokenize),
    ):
        answer = client.post(path, {**body, "visual_budget": 64})
        assert answer.status_code == 400, path
        assert "--trust-request-mm-kwargs" in answer.text


def test_tokenize_counts_the_tokens_of_a_pruned_request(client: Client) -> None:
    body = {"model": client.server.model, "messages": conversation()}
    whole = client.post("/tokenize", body).json()["count"]
    pruned = client.post("/tokenize", {**body, "visual_budget": 64}).json()["count"]
    assert whole - pruned == 512


def test_the_other_chat_routes_accept_a_budget(client: Client) -> None:
    body = {"model": client.server.model, "messages": conversation(), "max_tokens": 4}
    answer = client.post("/invocations", {**body, "visual_budget": 64})
    assert answer.json()["usage"]["visual_tokens"]["kept"] == 64

    def rendered(**extra: Any) -> int:
        return len(
            client.post("/v1/chat/completions/render", {**body, **extra}).json()["token_ids"]
        )

    assert rendered() - rendered(visual_budget=64) == 512


def test_metrics_count_tokens_and_measure_selection_time(client: Client) -> None:
    names = (
        "flashvlm_visual_tokens_seen_total",
        "flashvlm_visual_tokens_kept_total",
        "flashvlm_selection_seconds_count",
        "flashvlm_selection_seconds_sum",
    )
    before = [client.metric(name) for name in names]
    client.ask("a question nobody asked before?", visual_budget=48)
    after = [client.metric(name) for name in names]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown[:3] == [576, 48, 1]
    assert 0 < grown[3] < 5


def test_a_second_question_about_an_image_makes_no_encoder_call(client: Client) -> None:
    url = data_url(photo("galaxies").resize((500, 437)))
    names = ("flashvlm_feature_cache_misses", "flashvlm_feature_cache_hits")
    counts = [[client.metric(name) for name in names]]
    for question in ("how many stars?", "what shape is it?", "which colour?"):
        client.ask(messages=conversation(question, url), visual_budget=48)
        counts.append([client.metric(name) for name in names])
    first, *others = [
        [new - old for new, old in zip(after, before, strict=True)]
        for before, after in itertools.pairwise(counts)
    ]
    assert first == [1, 0]
    assert others == [[0, 1], [0, 1]]
    assert client.metric("flashvlm_feature_cache_bytes") > 0


def test_openapi_describes_the_visual_budget(client: Client) -> None:
    api = httpx.get(f"{client.server.url}/openapi.json", timeout=30).json()
    for path in ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"):
        body = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        model = api["components"]["schemas"][body["schema"]["$ref"].rsplit("/", 1)[1]]
        field = model["properties"]["visual_budget"]
        assert "Visual tokens to keep" in field["description"]
        kinds = ["integer", "number", "object", "string", "null"]
        assert [one["type"] for one in field["anyOf"]] == kinds


def test_a_client_that_disconnects_mid_stream_does_not_affect_others(client: Client) -> None:
    expected = text_of(client.ask(visual_budget=64))

    def leave() -> None:
        with (
            httpx.Client(timeout=30) as http,
            http.stream(
                "POST",
                f"{client.server.url}/v1/chat/completions",
                json={
                    "model": client.server.model,
                    "messages": conversation("tell me a story"),
                    "max_tokens": 200,
                    "stream": True,
                    "visual_budget": 100,
                },
            ) as answer,
        ):
            next(answer.iter_lines())

    threads = [threading.Thread(target=leave) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert text_of(client.ask(visual_budget=64)) == expected
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 30
    while client.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert math.isclose(client.metric("vllm:num_requests_running"), 0.0)
