# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/visual_tokens`` on running servers: it says what ordinary requests get."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.server import Server
from tests.vllm.test_server import QUESTION, Client, conversation

PATH = "/v1/visual_tokens"
SIDE = 24


class Traced(Client):
    """A client that can read which tokens the server's ordinary requests kept."""

    def __init__(self, server: Server, trace: Path) -> None:
        super().__init__(server)
        self.trace = trace

    def kept_of_latest(self) -> Any:
        """Return the kept positions of the item that the worker encoded last."""
        return json.loads((self.trace / "rank-0.jsonl").read_text().splitlines()[-1])["kept"]

    def lines(self) -> int:
        file = self.trace / "rank-0.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def explain(self, question: str = QUESTION, messages: Any = None, **extra: Any) -> Any:
        answer = self.post(PATH, self.body(question, messages, **extra))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def body(self, question: str = QUESTION, messages: Any = None, **extra: Any) -> dict[str, Any]:
        return {
            "model": self.server.model,
            "messages": conversation(question) if messages is None else messages,
            **extra,
        }


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("server")
    options = ("--plugins", "flashvlm", "--max-model-len", "4096", "--enable-prompt-tokens-details")
    environment = {"FLASHVLM_TRACE_DIR": str(folder)}
    with Server(clip_llava, options, log=folder / "log", environment=environment) as server:
        yield Traced(server, folder)


def flat(part: Any) -> list[int]:
    return [row * part["columns"] + column for row, column in part["kept"]]


@pytest.mark.parametrize("explained_first", [False, True])
@pytest.mark.parametrize("selector", ["flashvlm", "vispruner"])
def test_it_names_the_tokens_that_an_ordinary_request_keeps(
    client: Traced, selector: str, explained_first: bool
) -> None:
    question = f"what is behind her {selector} {explained_first}?"
    fields = {"visual_budget": 64, "visual_selector": selector}
    told = client.explain(question, **fields) if explained_first else None
    before = client.lines()
    answer = client.ask(question, **fields)
    # The ordinary request was encoded of its own: nothing that the explanation left answers it.
    assert client.lines() == before + 1
    kept = client.kept_of_latest()
    told = told or client.explain(question, **fields)
    (item,) = told["items"]
    (part,) = item["parts"]
    assert flat(part) == kept
    assert told["prompt_tokens"] == answer.usage.prompt_tokens
    assert (told["kept"], told["total"]) == (64, 576)
    assert (told["visual_budget"], told["visual_selector"]) == (64, selector)
    assert (part["rows"], part["columns"], part["frame"]) == (SIDE, SIDE, 0)
    assert not item["merged"]
    assert 0 < item["coverage"]["mean"] <= item["coverage"]["max"] <= 2
