# SPDX-License-Identifier: Apache-2.0
"""Attacks by a client on a server with every option of the plugin: what it tries, what happens.

The table in docs/operators/hardening.md lists them.
"""

import base64
import contextlib
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from testing.photo import data_url, photo
from testing.server import Server
from tests.engine.test_server import Client, conversation, text_of

BUDGET = 9
CACHE_GB = 0.06
"""Of vLLM's processor cache; two API processes would have one each."""
CHAT, EXPLAIN, MESSAGES = "/v1/chat/completions", "/v1/visual_tokens", "/v1/messages"
MINE, YOURS = (data_url(photo(name)) for name in ("astronaut", "cat"))
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    options = (
        *("--plugins", "flashvlm", "--max-model-len", "2048"),
        *("--visual-budget-under-load", "128:8", "--visual-steering", "own"),
        *("--visual-selector", "flashvlm-2", "--visual-playground"),
        *("--visual-explain-per-minute", "1000", "--trust-request-mm-kwargs"),
        *("--mm-processor-cache-gb", str(CACHE_GB)),
    )
    log = tmp_path_factory.mktemp("attacked") / "log"
    with Server(clip_llava, options, log=log) as server:
        yield Client(server)


def body(url: str = MINE, question: str = QUESTION, **more: Any) -> dict[str, Any]:
    """Return a chat request; ``uuid`` is that of its image."""
    own = {"uuid": more.pop("uuid")} if "uuid" in more else {}
    asked = {"messages": conversation(question, url, **own), "max_tokens": 8, "temperature": 0}
    return {"model": "", **asked, **more}


def post(client: Client, path: str = CHAT, headers: Any = None, **fields: Any) -> httpx.Response:
    """Send a request on a new connection: vLLM closes one after an error it does not handle."""
    sent = body(**fields) | {"model": client.server.model}
    return httpx.post(client.server.url + path, json=sent, headers=headers, timeout=120)


def answer(client: Client, **fields: Any) -> str:
    """Return the text of an answer with status 200."""
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture(autouse=True)
def others(client: Client) -> Iterator[None]:
    """Other clients' requests have the same answers before and after."""

    def asked() -> list[str]:
        return [text_of(client.ask(QUESTION, **own)) for own in ({}, {"visual_budget": BUDGET})]

    before = asked()
    yield
    assert asked() == before
    assert "EngineDeadError" not in client.server.log


# Identities.


@pytest.mark.parametrize(
    "uuid",
    [
        "flashvlm-5-5-" + "0" * 64,
        "flashvlm-closed-7-" + "1" * 64,
        "flashvlm-500-500-" + "2" * 64 + "~3",
        f"flashvlm-{'9' * 40}-{'9' * 40}-" + "3" * 64,
        "adapter:flashvlm-5-5-" + "4" * 64,
    ],
    ids=["kept", "closed", "shortened", "huge", "behind an adapter"],
)
def test_a_uuid_in_the_form_of_a_pruned_items_name_changes_nothing(
    client: Client, uuid: str
) -> None:
    whole, pruned = answer(client), answer(client, visual_budget=BUDGET)
    assert answer(client, uuid=uuid) == whole
    assert answer(client, uuid=uuid, visual_budget=BUDGET) == pruned


def test_a_guessed_uuid_gives_what_it_gives_without_budgets_and_no_more(client: Client) -> None:
    """A uuid is an item's name in vLLM: who sends it first decides what it is, in stock, too."""
    mine, yours = (
        {budget: answer(client, url=url, visual_budget=budget) for budget in (None, BUDGET)}
        for url in (MINE, YOURS)
    )
    assert mine[None] != yours[None]
    for number, budget in enumerate((None, BUDGET)):
        uuid = f"guessed-{number}"
        assert answer(client, url=YOURS, uuid=uuid, visual_budget=budget) == yours[budget]
        # Another client's pixels under the same uuid: the first picture answers.
        assert answer(client, url=MINE, uuid=uuid, visual_budget=budget) == yours[budget]
        # Under another uuid or none they are its own.
        assert answer(client, url=MINE, uuid=f"{uuid}-mine", visual_budget=budget) == mine[budget]
        assert answer(client, url=MINE, visual_budget=budget) == mine[budget]


def test_processor_arguments_cannot_forge_what_the_plugin_passes_inside(client: Client) -> None:
    for name in ("flashvlm_request", "flashvlm_items", "visual_keep_image", "visual_gap_image"):
        response = post(client, mm_processor_kwargs={name: {"budget": 1}}, visual_budget=BUDGET)
        assert response.status_code in {200, 400}, response.text
        if response.status_code == 200:
            assert response.json()["usage"]["visual_tokens"]["kept"] == BUDGET


# Headers.


def test_only_one_header_of_the_exact_name_sets_a_budget(client: Client) -> None:
    def kept(*headers: tuple[str | bytes, str | bytes], **fields: Any) -> tuple[int, int | None]:
        response = post(client, headers=list(headers), **fields)
        counted = response.json().get("usage", {}).get("visual_tokens") or {}
        return response.status_code, counted.get("kept")

    assert kept(("x-visual-budget", "9")) == (200, 9)
    assert kept(("X_Visual_Budget", "9"))[1] in {None, 576}
    assert kept(("X-Visual-Budget", "9"), ("x-visual-budget", "5"))[0] == 400
    for value in ("9, 5", "9;5", "9 5", "9\t5", "1e2", "٩", "0x9", "-1", ""):
        assert kept((b"X-Visual-Budget", value.encode()))[0] == 400, value
    # A field of the body takes precedence, so a proxy's header is a default and not a limit.
    assert kept(("X-Visual-Budget", "9"), visual_budget=5) == (200, 5)


# Bodies.


@pytest.mark.parametrize("path", [CHAT, EXPLAIN])
def test_odd_json_is_refused(client: Client, path: str) -> None:
    text = json.dumps(body(visual_budget="HERE") | {"model": client.server.model})
    nested = "[" * 100_000 + "]" * 100_000
    for value in (
        *("9" * 5000, "1e400", "-0.0", "NaN", "Infinity", '"\\ud800"', nested),
        '{"total":' * 500 + "9" + "}" * 500,
        '{"total": 9, "total": 1e999}',
        f'"{"9" * 1_000_000}"',
    ):
        sent = text.replace('"HERE"', value)
        response = client.post(path, sent)
        assert 400 <= response.status_code < 500, (value[:40], response.text[:300])


def test_a_budget_of_four_hundred_digits_keeps_all_tokens(client: Client) -> None:
    assert answer(client, visual_budget=int("9" * 400)) == answer(client)


def test_slow_bodies_do_not_block_the_route(client: Client) -> None:
    text = json.dumps(body(visual_budget=BUDGET) | {"model": client.server.model}).encode()
    head = (
        f"POST {EXPLAIN} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n"
    ).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", client.server.port)))
            slow.sendall(head + text[:100])
        started = time.monotonic()
        assert post(client, EXPLAIN, visual_budget=BUDGET).status_code == 200
        assert time.monotonic() - started < 20


def png_of(width: int, height: int) -> str:
    """Return a PNG of one colour whose rows are compressed a thousandfold, as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.mark.parametrize("path", [CHAT, EXPLAIN])
def test_a_decompression_bomb_is_refused_unread(client: Client, path: str) -> None:
    bomb = png_of(20_000, 20_000)  # 1.2 GB of pixels
    assert len(bomb) < 3_000_000
    before = memory(client)
    started = time.monotonic()
    assert post(client, path, url=bomb, visual_budget=BUDGET).status_code >= 400
    assert time.monotonic() - started < 20
    assert memory(client) - before < 300


# Growth.


def memory(client: Client) -> float:
    """Return the private memory of all processes of the server in MiB."""
    first = psutil.Process(client.server.process_id)
    every = [first, *first.children(recursive=True)]
    return sum(each.memory_full_info().uss for each in every) / 2**20


def series(client: Client) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Return names and labels of the plugin's metrics."""
    page = httpx.get(f"{client.server.url}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "flashvlm" in sample.name
    }


def test_clients_cannot_add_metric_labels(client: Client) -> None:
    post(client, visual_budget=BUDGET)
    post(client, EXPLAIN, visual_budget=BUDGET)
    post(client, headers=[("x-visual-budget", "9")])
    before = series(client)
    for number in range(20):
        post(client, visual_budget=BUDGET, visual_selector=f"made-up-{number}")
        post(client, visual_budget=BUDGET, user=f"user-{number}", visual_query=f"word {number}")
        post(client, visual_budget=BUDGET, visual_steering=f"made-up-{number}")
        post(client, visual_budget=10 + number, uuid=f"picture-{number}")
        client.post(CHAT, json.dumps(body() | {"model": f"model-{number}"}))
        client.post(f"/v1/visual_tokens/{number}", "{}")
    assert series(client) == before


@pytest.mark.slow
def test_many_questions_about_one_image_use_no_more_memory_than_the_caches_have(
    client: Client,
) -> None:
    """With a budget an item's name contains the question, so each question is a cache entry."""
    for number in range(40):
        answer(client, question=f"is it number {number}?", visual_budget=BUDGET)
    before = memory(client)
    for number in range(400):
        answer(client, question=f"what is number {number}?", visual_budget=BUDGET, uuid="one")
    # The API process and the engine core have vLLM's cache, and the API process this plugin's.
    assert memory(client) - before < 3 * CACHE_GB * 1024
