# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.endpoint_plugins`` entry point: typed request fields on vLLM's own routes."""

import functools
import inspect
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import State

from flashvlm_vllm.explain import playground
from flashvlm_vllm.explain import route as explain_route
from flashvlm_vllm.serving.metrics import StatisticsOnScrape
from flashvlm_vllm.serving.request_models import CHAT, REQUEST_MODELS
from flashvlm_vllm.serving.routes import refusals_of
from flashvlm_vllm.serving.sent_request import KeepSentRequest, keep_model
from flashvlm_vllm.settings import NAME
from flashvlm_vllm.vllm_compat import attach
from flashvlm_vllm.vllm_releases import remove_route


class FlashVLMEndpoint:
    """Adds typed request fields to vLLM's chat routes. The handlers are vLLM's own."""

    name = NAME
    required_tasks = None
    """On every server: one that embeds refuses a budget, which would have no effect."""

    def __init__(self) -> None:
        # API server processes that vLLM spawns do not parse a command line.
        attach.to_serving()

    def attach_router(self, app: FastAPI) -> None:
        """Replace each covered route by one with a typed request, and add this plugin's routes.

        vLLM's middlewares, such as the one that checks API keys, apply to all of them.
        """
        routes = [
            route for route in app.routes if isinstance(route, APIRoute) and "POST" in route.methods
        ]
        generates = any(route.path == CHAT for route in routes)
        for route in routes:
            model = REQUEST_MODELS.get(route.path)
            refusals = refusals_of(route.path, generates=generates)
            # Disabled routes (those of --enable-scale-out) have no request.
            if model is not None and "request" in inspect.signature(route.endpoint).parameters:
                endpoint = _with_request_model(route.endpoint, model)
            elif refusals:
                endpoint = route.endpoint
            else:
                continue
            _replace(app, route, endpoint, [*route.dependencies, *map(Depends, refusals)])
        app.add_middleware(KeepSentRequest)
        if not generates:
            return
        playground.attach(app)
        per_minute = getattr(app.state.args, "visual_explain_per_minute", None)
        explain_route.attach(
            app, explain_route.DEFAULT_PER_MINUTE if per_minute is None else per_minute
        )
        app.add_middleware(StatisticsOnScrape)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Store the engine client, so that scrapes of ``/metrics`` can read worker statistics."""
        StatisticsOnScrape.engine_client = engine_client


def _replace(app: FastAPI, route: APIRoute, endpoint: Any, dependencies: list[Any]) -> None:
    """Replace a route by one with another endpoint and other dependencies."""
    remove_route(app, route)
    app.add_api_route(
        route.path,
        endpoint,
        methods=["POST"],
        dependencies=dependencies,
        responses=route.responses,
        response_model=route.response_model,
        include_in_schema=route.include_in_schema,
    )


def _with_request_model(endpoint: Any, model: type) -> Any:
    """Return ``endpoint`` with its ``request`` parameter typed as ``model``."""

    @functools.wraps(endpoint)
    async def typed(*args: Any, **kwargs: Any) -> Any:
        keep_model(kwargs["request"])
        return await endpoint(*args, **kwargs)

    signature = inspect.signature(endpoint)
    parameters = [
        parameter.replace(annotation=model) if name == "request" else parameter
        for name, parameter in signature.parameters.items()
    ]
    typed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return typed
