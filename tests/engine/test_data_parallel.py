# SPDX-License-Identifier: Apache-2.0
"""Two engines behind one server: statistics and failed selections of both are collected."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from testing.server import Server
from tests.engine.test_selectors import third_party_selectors  # noqa: F401  # a fixture
from tests.engine.test_server import ARGUMENTS, Client, conversation

ENGINES = (0, 1)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(
    clip_llava: Path,
    third_party_selectors: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("parallel") / "log"
    paths = [str(third_party_selectors), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    options = ("--plugins", "flashvlm", "--data-parallel-size", "2")
    with Server(clip_llava, (*options, *ARGUMENTS), log=log, environment=environment) as server:
        yield Client(server)


def ask(client: Client, engine: int, question: str, **fields: object) -> httpx.Response:
    body = {
        "model": client.server.model,
        "messages": conversation(question),
        "max_tokens": 4,
        "visual_budget": 64,
        **fields,
    }
    headers = {"X-data-parallel-rank": str(engine)}
    url = f"{client.server.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120)


def test_the_metrics_page_has_the_statistics_of_every_engine(client: Client) -> None:
    before = client.metric("flashvlm_selection_seconds_count")
    for engine in ENGINES:
        for number in range(2):
            ask(client, engine, f"what is {number}?").raise_for_status()
    assert client.metric("flashvlm_selection_seconds_count") - before == 4
    assert client.metric("flashvlm_feature_cache_misses") == 2
    assert client.metric("flashvlm_feature_cache_hits") == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_selection_is_reported_by_the_engine_that_ran_it(
    client: Client, engine: int, stream: bool
) -> None:
    question = f"fails on {engine} {stream}"
    answer = ask(client, engine, question, visual_selector="raises", stream=stream)
    assert "no such colour" in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert ask(client, engine, question, visual_selector="first").status_code == 200
