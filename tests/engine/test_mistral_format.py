# SPDX-License-Identifier: Apache-2.0
"""Pixtral in Mistral's own format, over HTTP and offline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from testing.photo import data_url, photo
from testing.server import Server
from testing.tiny.mistral_format import build_mistral_format, prompt_ids
from tests.engine.conftest import REPOSITORY, StartEngine, token_ids

pytestmark = pytest.mark.slow

FORMAT = {"config_format": "mistral", "tokenizer_mode": "mistral", "load_format": "mistral"}
QUESTION, SYSTEM = "what color is the suit?", "the cat is on the table"
CONTEXT = 512
TOKENS, ROWS = 48, 6
"""Of an image in these tests, 224 x 168 pixels."""
IMAGE_ID = 10
CASES: Sequence[tuple[Any, Sequence[int]]] = (
    (None, (48, 48)),
    (0.5, (24, 24)),
    (7, (7, 7)),
    ({"total": 21}, (11, 10)),
)
"""A budget, and the tokens that are kept of each image."""


@pytest.fixture(scope="module")
def path() -> Path:
    return build_mistral_format(REPOSITORY / ".models" / "mistral-format")


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FORMAT.items()]
    log = tmp_path_factory.mktemp("server") / "log"
    plugin = {"VLLM_PLUGINS": "flashvlm"}
    with Server(
        path, [*flags, f"--max-model-len={CONTEXT}"], log=log, environment=plugin
    ) as server:
        yield server


def images(count: int) -> list[Image.Image]:
    return [photo(name).resize((224, 168)) for name in ("astronaut", "cat") * count][:count]


def chat(server: Server, *own: dict[str, Any], count: int = 2, **fields: Any) -> httpx.Response:
    """Ask about images, of which the first have settings of their own."""
    pictures: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(each)}} for each in images(count)
    ]
    for picture, settings in zip(pictures, own, strict=False):
        picture.update(settings)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [*pictures, {"type": "text", "text": QUESTION}]},
    ]
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 8}
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        json={**body, "return_token_ids": True, **fields},
        timeout=120,
    )


def test_a_chat_says_what_offline_generation_says(
    server: Server, path: Path, start_engine: StartEngine
) -> None:
    prompt = prompt_ids(QUESTION, images(2), SYSTEM)
    with start_engine(path, **FORMAT, max_model_len=CONTEXT) as engine:
        greedy = engine.llm.get_default_sampling_params()
        greedy.temperature, greedy.max_tokens = 0, 8
        asked: list[Any] = [
            {
                "prompt_token_ids": prompt,
                "multi_modal_data": {"image": images(2)},
                "mm_processor_kwargs": {"visual_budget": budget},
            }
            for budget, _ in CASES
        ]
        outputs = [engine.llm.generate(each, greedy, use_tqdm=False)[0] for each in asked]
    for (budget, kept), offline in zip(CASES, outputs, strict=True):
        answer = chat(server, visual_budget=budget).raise_for_status().json()
        assert answer["prompt_token_ids"] == offline.prompt_token_ids
        assert answer["choices"][0]["token_ids"] == token_ids(offline)
        assert answer["usage"]["prompt_tokens"] == len(prompt) - 2 * TOKENS + sum(kept)
        reported = answer["usage"]["visual_tokens"]["images"]
        assert [each["kept"] for each in reported] == list(kept)
        assert [each["total"] for each in reported] == [TOKENS, TOKENS]
    assert len({tuple(token_ids(each)) for each in outputs}) > 1


def test_the_rows_of_a_pruned_image_end_as_before(server: Server) -> None:
    whole, half = (
        chat(server, count=1, visual_budget=budget).raise_for_status().json()["prompt_token_ids"]
        for budget in (None, 0.5)
    )
    assert half == [each for number, each in enumerate(whole) if number not in dropped(whole)]


def dropped(whole: list[int]) -> set[int]:
    """Return the places of the second half of every row's tokens."""
    places = [number for number, each in enumerate(whole) if each == IMAGE_ID]
    wide = TOKENS // ROWS
    return {place for number, place in enumerate(places) if number % wide >= wide // 2}


def test_a_whole_image_from_the_cache_beside_a_pruned_one(server: Server) -> None:
    fresh = chat(server, {"visual_budget": 0.25}).raise_for_status().json()
    for own in ([], [{}, {"visual_budget": 0.25}], [{"visual_budget": 0.25}]):
        answer = chat(server, *own).raise_for_status().json()
        kept = [each["kept"] for each in answer["usage"]["visual_tokens"]["images"]]
        assert kept == [12 if index < len(own) and own[index] else TOKENS for index in (0, 1)]
    assert answer["choices"][0]["token_ids"] == fresh["choices"][0]["token_ids"]
    assert answer["prompt_token_ids"] == fresh["prompt_token_ids"]


def test_an_unpruned_prompt_must_fit_into_the_context(server: Server) -> None:
    """vLLM checks the prompt that the chat template makes, before anything is pruned."""
    refused = chat(server, count=10, visual_budget=0.1)
    assert refused.status_code == 400
    assert f"maximum context length is {CONTEXT}" in refused.text
    assert chat(server, visual_budget="fit").status_code == 200
