# SPDX-License-Identifier: Apache-2.0
"""Grids, limits and watches of ``POST /v1/visual_tokens``."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from flashvlm_vllm.explain import route
from flashvlm_vllm.explain.grids import parts_of
from flashvlm_vllm.ipc.explain_request import (
    WHOLE,
    Coverage,
    ItemRecord,
    PartRecord,
    Placed,
    Region,
)
from flashvlm_vllm.serving.rate_limit import Limits, limited_route
from flashvlm_vllm.worker.explain_watches import ExplainWatches


def part(places: list[list[int]], kept: list[bool], **fields: Any) -> PartRecord:
    scores = [number / 10 for number in range(len(places))]
    values: dict[str, Any] = {
        "part": 0,
        "frames": 1,
        "places": places,
        "kept": kept,
        "saliency": scores,
        "relevance": scores,
        "fused": scores,
        **fields,
    }
    return PartRecord(**values)


SQUARE = [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_grid_has_each_score_at_its_position() -> None:
    (grid,) = parts_of([part(SQUARE, [False, True, False, True])], {0: Placed(WHOLE)})
    assert grid == {
        "frame": 0,
        "rows": 2,
        "columns": 2,
        "region": [0.0, 0.0, 1.0, 1.0],
        "kept": [[0, 1], [1, 1]],
        "saliency": [[0.0, 0.1], [0.2, 0.3]],
        "relevance": [[0.0, 0.1], [0.2, 0.3]],
        "fused": [[0.0, 0.1], [0.2, 0.3]],
    }


def test_each_frame_has_its_own_grid() -> None:
    clip = part(SQUARE * 2, [True] + [False] * 6 + [True], frames=2, relevance=None)
    first, second = parts_of([clip], {})
    assert (first["frame"], first["kept"]) == (0, [[0, 0]])
    assert (second["frame"], second["kept"]) == (1, [[1, 1]])
    assert second["saliency"] == [[0.4, 0.5], [0.6, 0.7]]
    assert first["relevance"] is None
    assert first["region"] is None


def test_a_crop_at_the_edge_of_a_picture_has_the_region_of_its_remaining_rows() -> None:
    # Of a grid of 4 x 2 the two middle rows have tokens, except one cell.
    places = [[1, 0], [1, 1], [2, 0]]
    whole = Placed(Region(0.5, -0.5, 1.0, 1.5), grid=(4, 2))
    (grid,) = parts_of([part(places, [False, False, True])], {0: whole})
    assert (grid["rows"], grid["columns"]) == (2, 2)
    assert grid["region"] == [0.5, 0.0, 1.0, 1.0]
    assert grid["kept"] == [[1, 0]]
    assert grid["fused"] == [[0.0, 0.1], [0.2, None]]


def test_a_watch_is_removed_when_its_records_are_taken() -> None:
    watches = ExplainWatches()
    record = ItemRecord(False, None, [part(SQUARE, [True] * 4)])
    assert not watches.is_watching
    watches.add("one", {"a": [1, 2], "b": [1, 2]})
    watches.add("two", {"b": [3]})
    assert [watch.questions["b"] for watch in watches.of_item("b")] == [(1, 2), (3,)]
    watches.of_item("b")[0].records["b"] = record
    assert watches.take("two") == {}
    assert watches.take("one") == {"b": record}
    assert watches.take("one") == {}
    assert not watches.is_watching


def test_a_record_survives_serialisation() -> None:
    record = ItemRecord(True, Coverage(0.5, 0.25), [part(SQUARE, [False] * 4, relevance=None)])
    assert ItemRecord.unpacked(json.loads(json.dumps(record.packed()))) == record


def test_the_number_of_pending_watches_is_limited() -> None:
    watches = ExplainWatches()
    for number in range(200):
        watches.add(str(number), {"a": []})
    assert len(watches.of_item("a")) == 64
    assert watches.take("0") == {}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_per_minute_are_limited_and_the_wait_is_returned() -> None:
    clock = Clock()
    limits = Limits(per_minute=2, at_once=2, largest_body=10, now=clock)
    for clock.now in (0.0, 20.0):
        assert limits.enter() == 0
        limits.leave()
    clock.now = 30.5
    assert limits.enter() == 30
    clock.now = 60.0
    assert limits.enter() == 0
    assert limits.enter() == 20


def test_concurrent_requests_are_limited() -> None:
    limits = Limits(per_minute=100, at_once=2, largest_body=10)
    assert [limits.enter() for _ in range(3)] == [0, 0, 1]
    limits.leave()
    assert limits.enter() == 0


def client(limits: Limits) -> httpx.AsyncClient:
    async def echo(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    router = APIRouter(route_class=limited_route(limits))
    router.add_api_route("/", echo, methods=["POST"])
    app = FastAPI()
    app.include_router(router)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_large_body_is_refused_with_and_without_a_declared_length(
    is_declared: bool,
) -> None:
    limits = Limits(per_minute=100, at_once=1, largest_body=2**20)

    async def chunks() -> Any:
        for _ in range(3):
            yield b"x" * 2**19

    async with client(limits) as to:
        body = b"x" * (2**20 + 1) if is_declared else chunks()
        answer = await to.post("/", content=body)
        assert answer.status_code == 413
        assert "1 MiB" in answer.json()["error"]["message"]
        # The refused request does not count as running.
        answer = await to.post("/", content=b"x" * 2**20)
        assert answer.json() == {"length": 2**20}


async def test_a_slow_client_does_not_block_others() -> None:
    begun, released = asyncio.Event(), asyncio.Event()

    async def slowly() -> Any:
        yield b"x"
        begun.set()
        await released.wait()

    async with client(Limits(per_minute=9, at_once=1, largest_body=9)) as to:
        slow = asyncio.create_task(to.post("/", content=slowly()))
        await begun.wait()
        assert (await to.post("/", content=b"xx")).json() == {"length": 2}
        released.set()
        assert (await slow).json() == {"length": 1}


async def test_requests_over_the_limit_get_status_429_with_retry_after() -> None:
    async with client(Limits(per_minute=1, at_once=1, largest_body=10)) as to:
        answers = await asyncio.gather(*(to.post("/", content=b"x") for _ in range(2)))
        answers.sort(key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [200, 429]
        assert 1 <= int(answers[1].headers["retry-after"]) <= 60
        error = answers[1].json()["error"]
        assert (error["code"], error["type"]) == (429, "Too Many Requests")


@pytest.mark.parametrize(("per_minute", "status"), [(0, 404), (1, 400)])
async def test_a_rate_of_zero_disables_the_route(per_minute: int, status: int) -> None:
    app = FastAPI()
    app.add_exception_handler(RequestValidationError, lambda _, error: Response(status_code=400))
    route.attach(app, per_minute)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as to:
        assert (await to.post(route.PATH, json={})).status_code == status
