# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/visual_tokens`` on running servers: its reply matches the ordinary requests."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flashvlm_vllm.cli import main
from testing.photo import data_url, photo
from testing.server import Server
from testing.tiny.onevision import FRAME_TOKENS, build_onevision
from tests.engine.conftest import REPOSITORY
from tests.engine.test_server import QUESTION, Client, conversation
from tests.engine.test_server_video import CLIP, FRAMES, message

PATH = "/v1/visual_tokens"
SIDE = 24
KEY = "none"  # the API key that `Client` sends


class Traced(Client):
    """A client that can read the tokens that the server kept for ordinary requests."""

    def __init__(self, server: Server, trace: Path) -> None:
        super().__init__(server)
        self._trace = trace / "rank-0.jsonl"

    @property
    def encoded(self) -> list[Any]:
        """Return the kept positions of every item that the worker has selected so far."""
        lines = self._trace.read_text().splitlines() if self._trace.exists() else []
        return [json.loads(line)["kept"] for line in lines]

    def post_as(self, body: Any, path: str = PATH, **headers: str) -> httpx.Response:
        given = {"Authorization": f"Bearer {KEY}", **headers}
        return httpx.post(f"{self.server.url}{path}", json=body, headers=given, timeout=120)

    def body(self, question: str = QUESTION, messages: Any = None, **extra: Any) -> dict[str, Any]:
        messages = conversation(question) if messages is None else messages
        return {"model": self.server.model, "messages": messages, **extra}

    def explain(self, question: str = QUESTION, messages: Any = None, **extra: Any) -> Any:
        answer = self.post_as(self.body(question, messages, **extra))
        assert answer.status_code == 200, answer.text
        return answer.json()


def traced(model: Path, folder: Path, *options: str) -> Iterator[Traced]:
    options = ("--plugins", "flashvlm", "--api-key", KEY, *options)
    environment = {"FLASHVLM_TRACE_DIR": str(folder)}
    with Server(model, options, log=folder / "log", environment=environment) as server:
        yield Traced(server, folder)


@pytest.fixture(scope="module")
def client(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    options = ("--max-model-len", "4096", "--visual-explain-per-minute", "1000")
    yield from traced(clip_llava, tmp_path_factory.mktemp("server"), *options)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    model = build_onevision(REPOSITORY / ".models" / "onevision")
    yield from traced(model, tmp_path_factory.mktemp("onevision"), "--max-model-len", "8192")


def flat(part: Any) -> list[int]:
    return [row * part["columns"] + column for row, column in part["kept"]]


@pytest.mark.parametrize("explained_first", [False, True])
@pytest.mark.parametrize("selector", ["flashvlm", "vispruner"])
def test_the_explanation_has_the_tokens_that_an_ordinary_request_keeps(
    client: Traced, selector: str, explained_first: bool
) -> None:
    # For a selector that reads no question only the budget distinguishes the two requests.
    question, budget = "what is behind her?", 64 + explained_first
    fields = {"visual_budget": budget, "visual_selector": selector}
    explained = client.explain(question, **fields) if explained_first else None
    before = len(client.encoded)
    answer = client.ask(question, **fields)
    if explained_first:
        # The ordinary request is not answered from caches that the explanation filled.
        assert len(client.encoded) == before + 1
    kept = client.encoded[-1]
    explained = explained or client.explain(question, **fields)
    (item,) = explained["items"]
    (part,) = item["parts"]
    assert flat(part) == kept
    assert explained["prompt_tokens"] == answer.usage.prompt_tokens
    assert (explained["kept"], explained["total"]) == (budget, 576)
    assert (explained["visual_budget"], explained["visual_selector"]) == (budget, selector)
    assert (part["rows"], part["columns"], part["frame"]) == (SIDE, SIDE, 0)
    assert not item["merged"]
    assert 0 < item["coverage"]["mean"] < item["coverage"]["max"] <= 2
    for name in ("saliency", "relevance", "fused"):
        scores = [score for row in part[name] for score in row]
        assert len(scores) == 576
        assert min(scores) == 0
        assert max(scores) == pytest.approx(1, abs=1e-3)


def test_an_explanation_does_not_evict_the_ordinary_request_from_the_caches(client: Traced) -> None:
    client.ask("is it cached?", visual_budget=300)
    client.explain("is it cached?", visual_budget=300)
    before = len(client.encoded)
    client.ask("is it cached?", visual_budget=300)
    assert len(client.encoded) == before


def test_a_larger_budget_covers_more_and_costs_are_reported(client: Traced) -> None:
    explained = [client.explain(visual_budget=budget, budgets=[16, 0.25]) for budget in (16, 144)]
    small, large = (each["items"][0] for each in explained)
    assert small["coverage"]["mean"] > large["coverage"]["mean"]
    assert small["coverage"]["max"] >= large["coverage"]["max"]
    costs = [{"visual_budget": 16, "kept": 16}, {"visual_budget": 0.25, "kept": 144}]
    assert small["costs"] == costs
    assert [each["items"][0]["kept"] for each in explained] == [16, 144]


def test_an_item_that_is_kept_whole_has_score_maps(client: Traced) -> None:
    (item,) = client.explain(visual_budget=576)["items"]
    (part,) = item["parts"]
    assert len(part["kept"]) == item["kept"] == 576
    assert item["coverage"] is None
    assert max(max(row) for row in part["fused"]) > 0


def test_merged_tokens_have_no_place_but_count_for_the_coverage(client: Traced) -> None:
    (item,) = client.explain(visual_budget=64, visual_selector="prumerge+")["items"]
    assert item["merged"]
    assert item["parts"][0]["kept"] == []
    assert 0 < item["coverage"]["mean"] < item["coverage"]["max"]


def test_without_a_question_there_is_no_relevance(client: Traced) -> None:
    (item,) = client.explain(visual_budget=64, visual_query="")["items"]
    assert item["parts"][0]["relevance"] is None


def test_each_image_has_its_own_explanation_even_if_two_are_equal(client: Traced) -> None:
    urls = [data_url(photo(name)) for name in ("astronaut", "cat", "astronaut")]
    messages = message(*(("image_url", url) for url in urls))
    explained = client.explain(messages=messages, visual_budget=32)
    client.ask(messages=messages, visual_budget=32)
    kept = [flat(item["parts"][0]) for item in explained["items"]]
    # The ordinary request treats the first and the third as one item.
    assert kept[:2] == client.encoded[-2:]
    assert kept[0] == kept[2] != kept[1]
    assert [item["kept"] for item in explained["items"]] == [32] * 3


def test_the_region_of_the_grid_matches_the_crop_of_the_processor(client: Traced) -> None:
    wide = photo("astronaut").resize((672, 336))
    explained = client.explain(messages=conversation(url=data_url(wide)), visual_budget=8)
    (item,) = explained["items"]
    assert (item["width"], item["height"]) == (672, 336)
    assert item["parts"][0]["region"] == [0.25, 0.0, 0.75, 1.0]


async def test_concurrent_requests_get_their_own_explanations(client: Traced) -> None:
    questions = [f"where is number {number}?" for number in range(3)]
    alone = [client.explain(question, visual_budget=24)["items"] for question in questions]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as to:
        url = f"{client.server.url}{PATH}"
        bodies = [client.body(question, visual_budget=24) for question in questions]
        posts = [to.post(url, json=body, timeout=120) for body in bodies]
        answers = await asyncio.gather(*posts)
    assert [answer.json()["items"] for answer in answers] == alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "visual_budget"),
        ({"visual_budget": None}, "visual_budget"),
        ({"visual_budget": 0}, "a whole number of tokens"),
        ({"visual_budget": 64, "visual_selector": "best"}, "flashvlm-2"),
        ({"visual_budget": 64, "budgets": 3}, "budgets"),
        ({"visual_budget": 64, "budgets": [0]}, "a whole number of tokens"),
        ({"visual_budget": 64, "budgets": [1] * 65}, "64"),
        ({"visual_budget": 64, "messages": [{"role": "user", "content": "hi"}]}, "image"),
        ({"visual_budget": 64, "model": "other"}, "other"),
    ],
)
def test_invalid_requests_are_refused(client: Traced, fields: dict[str, Any], message: str) -> None:
    answer = client.post_as({**client.body(), **fields})
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == (404 if "model" in fields else 400)
    assert message in error["message"]


def test_an_item_given_by_uuid_only_is_explained_if_it_is_known(client: Traced) -> None:
    messages = conversation("by name?", uuid="a photo")
    given = client.post_as(client.body(messages=messages, visual_budget=64)).json()
    messages[0]["content"][0]["image_url"] = None
    found = client.post_as(client.body(messages=messages, visual_budget=64)).json()
    assert found["items"] == given["items"]
    messages[0]["content"][0]["uuid"] = "another photo"
    answer = client.post_as(client.body(messages=messages, visual_budget=64))
    assert answer.status_code == 400
    assert "data is not provided" in answer.json()["error"]["message"]


def test_the_api_key_is_required(client: Traced) -> None:
    body = client.body(visual_budget=64)
    assert client.post(PATH, body).status_code == 401
    assert client.post_as(body, Authorization="Bearer other").status_code == 401


def test_the_picture_shows_the_kept_patches(client: Traced) -> None:
    answer = client.post_as(client.body(visual_budget=64), Accept="image/png")
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (684, 684)


def test_the_content_of_requests_is_not_logged(client: Traced) -> None:
    client.explain("where is the zanzibar?", visual_budget=64, visual_query="quetzalcoatl")
    client.post_as(client.body("zanzibar", visual_budget=64, visual_selector="quetzalcoatl"))
    for word in ("zanzibar", "quetzalcoatl", "iVBOR"):
        assert word not in client.server.log


def test_the_command_prints_and_draws_the_kept_tokens(
    client: Traced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, png = tmp_path / "astronaut.png", tmp_path / "kept.png"
    photo("astronaut").save(image)
    common = ["explain", "--url", client.server.url, "--image", str(image), "--budget", "64"]
    status = main.main([*common, "--api-key", KEY, "--png", str(png), QUESTION])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "64 of 576" in printed
    assert sum(line.count("#") for line in printed.splitlines()) == 64
    assert Image.open(png).size == (684, 684)
    assert main.main([*common, "--api-key", KEY, "--json", QUESTION]) == 0
    assert json.loads(capsys.readouterr().out)["items"][0]["kept"] == 64
    assert main.main([*common, "--api-key", "other", QUESTION]) == 2
    assert "401" in capsys.readouterr().err


def test_the_explanation_of_a_video_has_every_frame(onevision: Traced) -> None:
    messages = message(("video_url", CLIP))
    explained = onevision.explain(messages=messages, visual_budget=12, budgets=[2, 40])
    onevision.ask(messages=messages, visual_budget=12)
    (item,) = explained["items"]
    parts = item["parts"]
    assert [part["frame"] for part in parts] == list(range(FRAMES))
    kept = [
        number * FRAME_TOKENS + place for number in range(FRAMES) for place in flat(parts[number])
    ]
    assert kept == onevision.encoded[-1]
    assert all(part["kept"] for part in parts)
    assert (item["modality"], item["width"], item["height"]) == ("video", 100, 90)
    assert item["kept"] == explained["kept"] == 12
    # A budget of fewer tokens than frames is not possible.
    assert [cost["kept"] for cost in item["costs"]] == [None, 40]
    answer = onevision.post_as(
        onevision.body(messages=messages, visual_budget=12), Accept="image/png"
    )
    assert answer.content.startswith(b"\x89PNG")


def test_the_explanation_of_tiles_has_base_crop_and_picture(onevision: Traced) -> None:
    messages = conversation(url=data_url(photo("astronaut").resize((200, 100))))
    explained = onevision.explain(messages=messages, visual_budget=30)
    onevision.ask(messages=messages, visual_budget=30)
    (item,) = explained["items"]
    base, picture = item["parts"]
    first = base["rows"] * base["columns"]
    assert flat(base) + [first + place for place in flat(picture)] == onevision.encoded[-1]
    assert base["region"] == picture["region"] == [0.0, 0.0, 1.0, 1.0]
    assert picture["columns"] > picture["rows"]


@pytest.mark.slow
def test_tensor_parallelism_gives_the_same_explanation(
    clip_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    for client in traced(clip_llava, tmp_path, "--tensor-parallel-size", "2"):
        for selector in ("flashvlm", "vispruner"):
            fields = {"visual_budget": 64, "visual_selector": selector}
            (item,) = client.explain(**fields)["items"]
            client.ask(**fields)
            assert flat(item["parts"][0]) == client.encoded[-1]
            assert item["parts"][0]["relevance"] is not None
        ranks = [(tmp_path / f"rank-{rank}.jsonl").read_text() for rank in range(2)]
        assert ranks[0] == ranks[1]
