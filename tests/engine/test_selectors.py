# SPDX-License-Identifier: Apache-2.0
"""Every built-in selector on an engine, and failures of selectors of other packages."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, InternalServerError
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.exceptions import VLLMValidationError

from flashvlm_vllm.models.layouts.anyres import tile_patches
from flashvlm_vllm.request.budget import spread_budget
from flashvlm_vllm.selection.flashvlm_2 import select_coherent
from flashvlm_vllm.selection.registry import BUILT_IN
from flashvlm_vllm.selection.selectors import (
    LanguageAttention,
    Selector,
    VisualTokens,
    run_selector,
)
from testing.photo import photo
from testing.server import Server
from tests.engine.conftest import Engine, StartEngine, token_ids
from tests.engine.reference import UserTurnIds, language_attention
from tests.engine.test_messages import ASKED
from tests.engine.test_parity import Reference
from tests.engine.test_server import ARGUMENTS, URL, Client, conversation, text_of
from tests.engine.test_server_options import VLLM
from tests.engine.third_party_selectors import FAILURES, install

QUESTION = "what color is the suit?"
PLACES = torch.cartesian_prod(torch.arange(24), torch.arange(24))
BUDGET = 65  # Odd: then PruMerge+ has a token for all dropped ones.
MERGING = [name for name, selector in BUILT_IN.items() if selector.merges]


@pytest.fixture(scope="module")
def third_party_selectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("third_party_selectors"))


@pytest.fixture(scope="module")
def client(
    clip_llava: Path, third_party_selectors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("selectors") / "log"
    options = ("--plugins", "flashvlm", "--visual-selector", "vispruner", "--block-size", "32")
    paths = [str(third_party_selectors), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with Server(clip_llava, (*options, *ARGUMENTS), log=log, environment=environment) as server:
        yield Client(server)


@pytest.fixture(scope="module")
def engine(clip_llava: Path, start_engine: StartEngine) -> Iterator[Engine]:
    with start_engine(clip_llava) as started:
        yield started


class Seen:
    """Transformers' features, saliency and keys of a photograph, crop by crop."""

    def __init__(self, path: Path, image: Any) -> None:
        self.reference = Reference(path)
        captured: list[Tensor] = []
        layers = self.reference.model.model.vision_tower.encoder.layers
        hook = layers[-2].self_attn.k_proj.register_forward_hook(
            lambda module, inputs, output: captured.append(output)
        )
        self.features, self.saliency, self.projected = self.reference.encode(image)
        hook.remove()
        self.keys = captured[0][:, 1:].unflatten(-1, (-1, 32))

    def tokens(
        self, query: list[int], selector: Selector, budget: int = BUDGET, crop: int = 0
    ) -> VisualTokens:
        embed = self.reference.model.get_input_embeddings()
        is_read = selector.uses_llm and len(self.projected) == 1
        return VisualTokens(
            budget=budget,
            projected=self.projected[crop],
            features=self.features[crop],
            saliency=self.saliency[crop],
            text=embed(torch.tensor(query)).detach() if query else None,
            keys=self.keys[crop],
            places=PLACES,
            seed=0,
            attention=self.attention(query, selector) if query and is_read else None,
        )

    def attention(self, query: list[int], selector: Selector) -> LanguageAttention:
        turn = UserTurnIds(self.reference.processor.tokenizer)
        left_out = (PLACES.sum(dim=1) % 2).nonzero()[:, 0] if selector.llm_checkerboard else None
        return language_attention(self.reference.model, turn, self.projected[0], query, left_out)

    def project(self, merged: Tensor) -> Tensor:
        with torch.inference_mode():
            projected: Tensor = self.reference.model.model.multi_modal_projector(merged)
        return projected


@pytest.fixture(scope="module")
def seen(clip_llava: Path) -> Seen:
    return Seen(clip_llava, photo("astronaut"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_answers_of_every_selector_equal_transformers_given_the_same_tokens(
    name: str, engine: Engine, seen: Seen
) -> None:
    selector = BUILT_IN[name]
    ids = token_ids(engine.ask(QUESTION, BUDGET, selector=name))
    record = engine.kept()[-1]
    assert record["total"] == 576
    assert bool(record["query"]) is selector.uses_question
    chosen = run_selector(name, selector, seen.tokens(record["query"], selector), trusted=False)
    if name in MERGING:
        assert record["kept"] is None
        assert chosen.merged is not None
        order = chosen.spots.sort().indices
        visual, places = seen.project(chosen.merged)[order], chosen.spots[order]
    else:
        assert chosen.indices is not None
        kept = set(record["kept"])
        assert len(kept) == BUDGET
        agreed = len(kept & set(chosen.indices.tolist()))
        if name == "random":
            assert agreed < BUDGET  # The seed is the image's hash, which only vLLM has.
        else:
            # Algorithm 1 and greedy searches amplify a difference in the last digit.
            assert agreed >= (BUDGET if name == "uniform" else 0.7 * BUDGET), agreed
        places = torch.tensor(record["kept"])
        visual = seen.projected[0, places]
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    assert ids == seen.reference.generate(prompt, visual, len(ids), places, 576)
    if name in MERGING:
        # With closed positions, merged tokens are in the order of the selector.
        closed = token_ids(engine.ask(QUESTION, BUDGET, selector=name, positions="closed"))
        visual = seen.project(chosen.merged)
        assert closed == seen.reference.generate(prompt, visual, len(closed))


def test_flashvlm_2_gets_the_places_of_tokens_in_each_crop_of_llava_next(
    llava_next: Path, start_engine: StartEngine
) -> None:
    size = (640, 300)  # After unpadding, the patches of a tile are not a whole raster.
    seen = Seen(llava_next, photo("cat").resize(size))
    crops, count = seen.features.shape[:2]
    config = seen.reference.model.config
    grid = get_anyres_image_grid_shape(size[::-1], config.image_grid_pinpoints, 336)
    picture = torch.cat([torch.arange(count), tile_patches(grid, 24, size[::-1])])
    rows_of = [(picture // count == crop).nonzero().flatten() for crop in range(crops)]
    shares = spread_budget(BUDGET, [len(rows) for rows in rows_of])
    with start_engine(llava_next, max_model_len=8192) as engine:
        engine.ask(QUESTION, BUDGET, [photo("cat").resize(size)], selector="flashvlm-2")
        record = engine.kept()[-1]
    text = seen.reference.model.get_input_embeddings()(torch.tensor(record["query"])).detach()
    expected: list[int] = []
    for crop, (rows, share) in enumerate(zip(rows_of, shares, strict=True)):
        patches = picture[rows] % count
        chosen = select_coherent(
            seen.projected[crop, patches],
            seen.saliency[crop, patches],
            text,
            share,
            seen.features[crop, patches],
            torch.stack([patches // 24, patches % 24], dim=1),
        )
        expected += rows[chosen].tolist()
    assert len(record["kept"]) == BUDGET
    assert len(set(record["kept"]) & set(expected)) >= 0.9 * BUDGET


def test_merging_selectors_merge_crop_by_crop_on_llava_next(
    llava_next: Path, start_engine: StartEngine
) -> None:
    image = photo("astronaut").resize((672, 672))  # Four tiles without padding.
    seen = Seen(llava_next, image)
    crops, count = seen.features.shape[:2]
    shares = spread_budget(BUDGET, [count] * crops)
    with start_engine(llava_next, max_model_len=8192) as engine:
        for name in MERGING:
            selector = BUILT_IN[name]
            ids = token_ids(engine.ask(QUESTION, BUDGET, [image], selector=name))
            query = engine.kept()[-1]["query"]
            chosen = [
                run_selector(
                    name, selector, seen.tokens(query, selector, share, crop), trusted=True
                )
                for crop, share in enumerate(shares)
            ]
            prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
            visual = seen.project(torch.cat([each.merged for each in chosen]))
            assert len(visual) == BUDGET
            # Base, then two by two tiles of 24 by 24 with a newline after each row.
            spots = torch.stack([torch.cat([each.spots for each in chosen]), crops_of(shares)])
            places = torch.tensor([place_in_next(*each) for each in spots.T.tolist()])
            order = places.argsort()
            whole = 576 + 48 * 49
            expected = seen.reference.generate(
                prompt, visual[order], len(ids), places[order], whole
            )
            assert ids == expected, name
            output = engine.ask(QUESTION, BUDGET, [image], selector=name, positions="closed")
            closed = token_ids(output)
            assert closed == seen.reference.generate(prompt, visual, len(closed)), name


def crops_of(shares: list[int]) -> Tensor:
    """Return the crop of each token."""
    return torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))


def place_in_next(patch: int, crop: int) -> int:
    """Return the index of a crop's patch in the prompt of a square of four tiles."""
    if crop == 0:
        return patch
    row, column = patch // 24 + (crop - 1) // 2 * 24, patch % 24 + (crop - 1) % 2 * 24
    return 576 + row * 49 + column


def test_a_second_question_hits_the_prefix_cache_if_the_selector_reads_no_question(
    client: Client,
) -> None:
    def cached(question: str, selector: str) -> int:
        fields = {"visual_budget": 300, "cache_salt": selector, "visual_selector": selector}
        answer = client.ask(question, **fields)
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    for name, selector in BUILT_IN.items():
        assert cached("what is he holding?", name) == 0
        again = cached("where is the flag?", name)
        assert again == 0 if selector.uses_question else again >= 256, name


def test_a_request_overrides_the_default_selector_of_the_server(client: Client) -> None:
    default = text_of(client.ask(visual_budget=64))
    assert default == text_of(client.ask(visual_budget=64, visual_selector="vispruner"))
    assert default == text_of(client.ask(visual_budget=64, visual_selector=None))
    by_metadata = client.ask(metadata={"visual_budget": "64", "visual_selector": "uniform"})
    assert text_of(by_metadata) == text_of(client.ask(visual_budget=64, visual_selector="uniform"))
    assert text_of(by_metadata) != default
    assert by_metadata.usage.visual_tokens["kept"] == 64


@pytest.mark.parametrize("name", ["flashvml", "FlashVLM", "../../etc", "x" * 64])
@pytest.mark.parametrize("budget", [64, None])
def test_an_unknown_selector_is_refused_with_the_known_names(
    client: Client, name: str, budget: int | None
) -> None:
    with pytest.raises(BadRequestError) as error:
        client.ask(visual_budget=budget, visual_selector=name)
    for known in (*BUILT_IN, "first"):
        assert known in str(error.value)
    assert text_of(client.ask(visual_budget=64))


@pytest.mark.parametrize("value", [5, True, [], {"name": "flashvlm"}, "", "   ", "x" * 65])
def test_an_invalid_selector_name_is_refused(client: Client, value: Any) -> None:
    with pytest.raises(BadRequestError, match="visual_selector"):
        client.ask(visual_budget=64, visual_selector=value)


def test_an_unknown_selector_is_refused_in_offline_use(engine: Engine) -> None:
    with pytest.raises(
        VLLMValidationError, match=r"known: flashvlm, flashvlm-2, llm-attention, vispruner"
    ):
        engine.ask(QUESTION, BUDGET, selector="flashvml")
    assert engine.ask(QUESTION, BUDGET, selector="flashvlm")


def test_a_server_with_an_unknown_default_selector_does_not_start(clip_llava: Path) -> None:
    command = [VLLM, "serve", str(clip_llava), "--plugins", "flashvlm"]
    ended = subprocess.run(
        [*command, "--visual-selector", "flashvml"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0
    assert "known: flashvlm, flashvlm-2, llm-attention, vispruner" in ended.stderr + ended.stdout


def test_a_third_party_selector_is_served(client: Client) -> None:
    assert client.ask(visual_budget=64, visual_selector="first").usage.visual_tokens["kept"] == 64
    assert text_of(client.ask(visual_budget=64, visual_selector="double"))


def test_a_selector_is_not_called_for_more_tokens_than_its_limit(client: Client) -> None:
    with pytest.raises(BadRequestError) as error:
        client.ask(visual_budget=64, visual_selector="small")
    message = str(error.value)
    assert "small takes at most 575 visual tokens" in message
    assert "image 0 has 576" in message
    assert "flashvlm-2" in message
    # Without pruning the limit does not apply.
    assert text_of(client.ask(visual_selector="small"))
    assert text_of(client.ask(visual_budget=576, visual_selector="small"))


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_third_party_selector_fails_its_own_request_only(
    client: Client, name: str
) -> None:
    expected = text_of(client.ask(visual_budget=64))
    # The second time the image and the first blocks of the prompt are cached.
    for _ in range(2):
        with pytest.raises(InternalServerError) as error:
            client.ask(visual_budget=64, visual_selector=name)
        assert f"visual_selector: {name}" in str(error.value)
        assert FAILURES[name] in str(error.value)
    assert text_of(client.ask(visual_budget=64)) == expected


async def test_failing_selectors_do_not_affect_concurrent_requests(client: Client) -> None:
    names = [*FAILURES, "first", "flashvlm", "visionzip", None]
    expected = {
        name: text_of(client.ask("in flight?", visual_budget=64, visual_selector=name))
        for name in names
        if name not in FAILURES
    }
    server = client.server
    together = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answers = await asyncio.gather(
        *(
            together.chat.completions.create(
                model=server.model,
                messages=conversation("in flight?"),
                max_tokens=8,
                temperature=0,
                extra_body={
                    "visual_budget": 64,
                    "visual_selector": name,
                    "cache_salt": "in flight",
                },
            )
            for name in names
        ),
        return_exceptions=True,
    )
    for name, answer in zip(names, answers, strict=True):
        if name in FAILURES:
            assert isinstance(answer, InternalServerError), name
            assert FAILURES[name] in str(answer)
        else:
            assert text_of(answer) == expected[name], name


def test_a_failing_selector_in_a_stream_sends_only_the_error(client: Client) -> None:
    body = {
        "model": client.server.model,
        "messages": conversation("stream?"),
        "max_tokens": 8,
        "stream": True,
        "visual_budget": 64,
        "visual_selector": "short",
    }
    lines = client.post("/v1/chat/completions", body).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    (event,) = events[:-1]
    assert FAILURES["short"] in json.loads(event)["error"]["message"]


def test_a_failing_selector_in_a_batch_returns_the_error(client: Client) -> None:
    body = {
        "model": client.server.model,
        "messages": [conversation("is there a dog?"), conversation("is there a flag?")],
        "visual_budget": 64,
        "max_tokens": 8,
        "temperature": 0,
    }
    path = "/v1/chat/completions/batch"
    failed = client.post(path, {**body, "visual_selector": "raises"})
    assert failed.status_code == 500
    assert FAILURES["raises"] in failed.json()["error"]["message"]
    assert len(client.post(path, body).json()["choices"]) == 2


def test_a_failing_selector_in_responses_returns_the_error(client: Client) -> None:
    content = [
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    body = {
        "model": client.server.model,
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": 8,
        "visual_budget": 64,
        "visual_selector": "raises",
    }
    failed = client.post("/v1/responses", body)
    assert failed.status_code == 500
    assert FAILURES["raises"] in failed.json()["error"]["message"]

    lines = client.post("/v1/responses", {**body, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:"]
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "error",
    ]
    assert FAILURES["raises"] in events[-1]["message"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]

    served = client.post("/v1/responses", {**body, "visual_selector": "uniform"})
    assert served.json()["status"] in ("completed", "incomplete")


def test_openapi_describes_the_selector(client: Client) -> None:
    import httpx

    api = httpx.get(f"{client.server.url}/openapi.json", timeout=30).json()
    field = api["components"]["schemas"]["VisualChatCompletionRequest"]["properties"][
        "visual_selector"
    ]
    assert "by name" in field["description"]


def test_a_failing_selector_in_messages_returns_the_error(client: Client) -> None:
    body = {
        "model": client.server.model,
        "messages": ASKED,
        "max_tokens": 8,
        "visual_budget": 64,
        "visual_selector": "raises",
    }
    failed = client.post("/v1/messages", body)
    assert failed.status_code == 500
    assert failed.json()["type"] == "error"
    assert FAILURES["raises"] in failed.json()["error"]["message"]
    events = client.post("/v1/messages", {**body, "stream": True}).text.split("\n\n")
    name, _, data = events[0].partition("\ndata: ")
    assert name == "event: error"
    assert FAILURES["raises"] in json.loads(data)["error"]["message"]
    assert "visual_tokens" not in "".join(events)
