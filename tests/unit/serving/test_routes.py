# SPDX-License-Identifier: Apache-2.0
"""Refusals of routes that no server of the engine tests has.

`tests/engine/test_routes_with_pictures.py` calls the others.
"""

from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI

from flashvlm_vllm.request.refusal import Reason, Refusal
from flashvlm_vllm.serving.routes import refusals_of
from flashvlm_vllm.serving.sent_request import KeepSentRequest

COHERE = ("/cohere/v2/chat", "/cohere/v2/chat/render")


async def call(path: str, body: Any, *header: str, generates: bool = True) -> int:
    app = FastAPI()

    async def answer(request: dict[str, Any]) -> None: ...

    dependencies = [Depends(each) for each in refusals_of(path, generates=generates)]
    app.add_api_route(path, answer, methods=["POST"], dependencies=dependencies)
    app.add_middleware(KeepSentRequest)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as http:
        headers = [("X-Visual-Budget", value) for value in header]
        return (await http.post(path, json=body, headers=headers)).status_code


@pytest.mark.parametrize("path", COHERE)
async def test_cohere_refuses_fields_and_names_the_header(path: str) -> None:
    with pytest.raises(Refusal, match=r"visual_budget.* send the header X-Visual-Budget") as error:
        await call(path, {"visual_budget": None})
    assert error.value.reason is Reason.WRONG_ROUTE
    assert await call(path, {"message": "hello"}, "64") == 200


async def test_classify_refuses_fields_and_header() -> None:
    for body, header in (({"visual_selector": "uniform"}, []), ({}, ["64"]), ({}, ["many"])):
        with pytest.raises(Refusal, match="it has no effect on /classify"):
            await call("/classify", body, *header, generates=False)
    assert await call("/classify", {"metadata": {"user": "a"}}, generates=False) == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_other_routes_are_left_alone(path: str) -> None:
    assert not refusals_of(path, generates=True)
    assert not refusals_of("/invocations", generates=True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "hello"},
        {"messages": [None, 1, "text", {"content": None}, {"content": "text"}]},
        {"messages": [{"content": [None, "text", {"content": "text"}, {"content": [None]}]}]},
        {"messages": [{"content": [{"type": "tool_use", "input": {"visual_budget": 1}}]}]},
        {"extra_body": [], "metadata": {"visual_budget": "64"}, "visual_budget": 64},
    ],
    ids=repr,
)
async def test_bodies_of_any_form_pass_to_the_model_of_messages(body: Any) -> None:
    """Whether they are requests is checked by vLLM's model."""
    assert await call("/v1/messages", body) == 200


async def test_blocks_deeper_than_those_of_a_tool_result_are_not_read() -> None:
    block: Any = {"visual_budget": 1}
    for _ in range(300):
        block = {"content": [block]}
    assert await call("/v1/messages", {"messages": [block]}) == 200
