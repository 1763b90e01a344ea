# SPDX-License-Identifier: Apache-2.0
"""vLLM's processor cache in shared memory, which stores an item's fields as addresses only."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import InternalServerError

from testing.server import Server
from tests.engine.test_server import ARGUMENTS, Client, text_of
from tests.engine.third_party_selectors import FAILURES, install


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("shared")
    cache = ("--mm-processor-cache-type", "shm", "--mm-processor-cache-gb", "0.1")
    options = ("--plugins", "flashvlm", *cache, *ARGUMENTS)
    environment = {"PYTHONPATH": str(install(folder))}
    with Server(clip_llava, options, log=folder / "log", environment=environment) as server:
        yield Client(server)


def test_each_budget_and_question_has_its_own_cached_item(client: Client) -> None:
    requests = [
        (q, b) for q in ("what is he holding?", "where is the flag?") for b in (8, 64, None)
    ]
    first = [client.ask(question, visual_budget=budget) for question, budget in requests]
    again = [client.ask(question, visual_budget=budget) for question, budget in requests]
    for (_, budget), answer, repeated in zip(requests, first, again, strict=True):
        assert answer.usage.visual_tokens["kept"] == (budget or 576)
        assert text_of(repeated) == text_of(answer)


@pytest.mark.parametrize("name", ["raises", "short"])
def test_a_failing_third_party_selector_is_reported(client: Client, name: str) -> None:
    # The second time the item comes from the cache.
    for _ in range(2):
        with pytest.raises(InternalServerError) as error:
            client.ask(visual_budget=64, visual_selector=name)
        assert FAILURES[name] in str(error.value)
    assert text_of(client.ask(visual_budget=64, visual_selector="first"))
