# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/visual_tokens``: which tokens a request keeps of its images and videos, and why."""

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, WithJsonSchema
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.sampling_params import SamplingParams

from flashvlm_vllm.explain.drawing import draw
from flashvlm_vllm.explain.grids import parts_of
from flashvlm_vllm.ipc.explain_request import ExplainItem, ExplainRequest, ItemRecord
from flashvlm_vllm.ipc.worker_calls import start_explaining, take_explanation
from flashvlm_vllm.request.budget import BUDGET, Budget, parse_budget
from flashvlm_vllm.request.request_budget import as_json
from flashvlm_vllm.serving import request_context, request_log, selector_failures
from flashvlm_vllm.serving.rate_limit import Limits, limited_route
from flashvlm_vllm.serving.request_models import BUDGET_SCHEMA, VisualChatCompletionRequest

PATH = "/v1/visual_tokens"
DEFAULT_PER_MINUTE = 60

_PNG = "image/png"
_ERRORS = (400, 404, 413, 429, 500)
_AT_ONCE = 4
_LARGEST_BODY = 64 * 2**20
_MOST_BUDGETS = 64
_BUDGETS = (32, 64, 128, 192, 256)
"""Default budgets to compare; some are in the paper's table 1."""


def _parse_budgets(value: object) -> list[Budget]:
    if not isinstance(value, list) or len(value) > _MOST_BUDGETS:
        raise ValueError(f"budgets is a list of at most {_MOST_BUDGETS} budgets")
    budgets = [parse_budget(each) for each in value]
    if None in budgets:
        raise ValueError("budgets must not contain null")
    return [each for each in budgets if each is not None]


class VisualTokensRequest(VisualChatCompletionRequest):
    """A chat completion request; sampling parameters have no effect."""

    budgets: Annotated[
        Any,
        BeforeValidator(_parse_budgets),
        WithJsonSchema({"type": "array", "items": BUDGET_SCHEMA, "maxItems": _MOST_BUDGETS}),
    ] = Field(
        default=list(_BUDGETS),
        description="Other budgets whose numbers of kept tokens are returned. Nothing is selected "
        "for them.",
    )


def attach(app: FastAPI, per_minute: int) -> None:
    """Add the route, unless ``per_minute`` is 0."""
    if not per_minute:
        return
    # As for vLLM's own routes, a request is aborted when its client disconnects.
    cancelled: Any = with_cancellation
    counted: Any = load_aware_call
    router = APIRouter(route_class=limited_route(Limits(per_minute, _AT_ONCE, _LARGEST_BODY)))
    router.add_api_route(
        PATH,
        cancelled(counted(create_visual_tokens)),
        methods=["POST"],
        dependencies=[Depends(validate_json_request)],
        responses={
            200: {"content": {_PNG: {}}},
            **{status: {"model": ErrorResponse} for status in _ERRORS},
        },
    )
    app.include_router(router)


async def create_visual_tokens(request: VisualTokensRequest, raw_request: Request) -> Response:
    """Run the request as a chat completion of one token, and return which tokens were kept."""
    handler = raw_request.app.state.openai_serving_chat
    if handler is None:
        raise NotImplementedError("the model does not support the chat completions API")
    explain_id = uuid.uuid4().hex
    with request_context.collecting(explain_id=explain_id) as collected:
        try:
            answer = await _explain(explain_id, request, handler, collected)
        finally:
            request_log.log_request(request, raw_request, collected)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if _PNG not in raw_request.headers.get("accept", ""):
        return JSONResponse(answer)
    asked = _explain_request(collected)
    assert asked is not None
    pictures = [item.pictures for item in asked.items]
    drawn = await asyncio.to_thread(draw, list(zip(answer["items"], pictures, strict=True)))
    return Response(drawn, media_type=_PNG)


async def _explain(
    explain_id: str,
    request: VisualTokensRequest,
    handler: Any,
    collected: request_context.Collected,
) -> Any:
    rendered = await handler.render_chat_request(request)
    if isinstance(rendered, ErrorResponse):
        return rendered
    _, (engine_input,) = rendered
    asked = _explain_request(collected)
    if asked is None or not asked.items:
        raise VLLMValidationError(
            f"there is nothing to explain: the request needs an image or a video, and a {BUDGET}, "
            "from the request or as the server's default",
            parameter=BUDGET,
        )
    records = await _run(explain_id, asked, engine_input, request, handler)
    answer = {
        "object": "visual_tokens",
        "model": handler.models.model_name(_adapter(request, handler)),
        BUDGET: as_json(asked.budget),
        "visual_selector": asked.selector,
        "visual_positions": _layout(collected),
        "prompt_tokens": len(engine_input["prompt_token_ids"]),
        "total": sum(item.count.total for item in asked.items),
        "kept": sum(item.count.kept(item.budget) for item in asked.items),
        "items": await asyncio.to_thread(_items, asked, records, request.budgets),
    }
    return await selector_failures.checked(answer, collected.fallible_items, handler)


def _explain_request(collected: request_context.Collected) -> ExplainRequest | None:
    return None if collected.latest is None else collected.latest.explain


def _layout(collected: request_context.Collected) -> str | None:
    """Return the layout of the kept tokens; ``None`` if nothing is pruned."""
    return str(collected.layouts[-1].result) if collected.layouts else None


def _adapter(request: VisualTokensRequest, handler: Any) -> Any:
    return handler._maybe_get_adapters(request, supports_default_mm_loras=True)


async def _run(
    explain_id: str,
    asked: ExplainRequest,
    engine_input: Any,
    request: VisualTokensRequest,
    handler: Any,
) -> Mapping[str, ItemRecord]:
    """Run the request in the engine; return the worker's records by selection key."""
    engine = handler.engine_client
    questions = {item.selection_key: item.question_ids for item in asked.items}
    await start_explaining(engine, explain_id, questions)
    try:
        async for _ in engine.generate(
            engine_input,
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
            f"visual-{explain_id}",
            lora_request=_adapter(request, handler),
        ):
            pass
    finally:
        records = await take_explanation(engine, explain_id)
    if set(questions) - set(records):
        raise GenerationError("the worker has no record of the selection")
    return records


def _items(
    asked: ExplainRequest, records: Mapping[str, ItemRecord], budgets: Sequence[Budget]
) -> list[dict[str, Any]]:
    return [_item(item, records[item.selection_key], budgets) for item in asked.items]


def _item(item: ExplainItem, record: ItemRecord, budgets: Sequence[Budget]) -> dict[str, Any]:
    return {
        "modality": item.modality,
        "width": item.width,
        "height": item.height,
        "total": item.count.total,
        "kept": item.count.kept(item.budget),
        BUDGET: item.budget,
        "visual_selector": item.selector,
        "merged": record.merged,
        "coverage": None if record.coverage is None else asdict(record.coverage),
        "costs": [{BUDGET: each, "kept": _cost(item, each)} for each in budgets],
        "parts": parts_of(record.parts, item.placed),
    }


def _cost(item: ExplainItem, budget: Budget) -> int | None:
    """Return the number of tokens that a budget keeps; ``None`` if the budget is refused."""
    if isinstance(budget, int) and budget < item.count.floor:
        return None
    return item.count.kept(budget)
