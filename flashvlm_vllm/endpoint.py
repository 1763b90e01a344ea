# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.endpoint_plugins`` entry point: typed request fields on vLLM's own routes."""

import functools
import inspect
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import State

from flashvlm_vllm.explain import playground
from flashvlm_vllm.explain import route as explain_route
from flashvlm_vllm.serving.metrics import StatisticsOnScrape
from flashvlm_vllm.serving.request_models import REQUEST_MODELS
from flashvlm_vllm.settings import NAME
from flashvlm_vllm.vllm_compat import attach
from flashvlm_vllm.vllm_releases import remove_route


class FlashVLMEndpoint:
    """Adds typed request fields to vLLM's chat routes. The handlers are vLLM's own."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        # API server processes that vLLM spawns do not parse a command line.
        attach.to_serving()

    def attach_router(self, app: FastAPI) -> None:
        """Replace each covered route by one with a typed request, and add this plugin's routes.

        vLLM's middlewares, such as the one that checks API keys, apply to all of them.
        """
        for route in list(app.routes):
            if isinstance(route, APIRoute) and "POST" in route.methods:
                model = REQUEST_MODELS.get(route.path)
                if model is not None:
                    remove_route(app, route)
                    app.add_api_route(
                        route.path,
                        _with_request_model(route.endpoint, model),
                        methods=["POST"],
                        dependencies=route.dependencies,
                        responses=route.responses,
                    )
        playground.attach(app)
        per_minute = getattr(app.state.args, "visual_explain_per_minute", None)
        explain_route.attach(
            app, explain_route.DEFAULT_PER_MINUTE if per_minute is None else per_minute
        )
        app.add_middleware(StatisticsOnScrape)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Store the engine client, so that scrapes of ``/metrics`` can read worker statistics."""
        StatisticsOnScrape.engine_client = engine_client


def _with_request_model(endpoint: Any, model: type) -> Any:
    """Return ``endpoint`` with its ``request`` parameter typed as ``model``."""

    @functools.wraps(endpoint)
    async def typed(*args: Any, **kwargs: Any) -> Any:
        return await endpoint(*args, **kwargs)

    signature = inspect.signature(endpoint)
    parameters = [
        parameter.replace(annotation=model) if name == "request" else parameter
        for name, parameter in signature.parameters.items()
    ]
    typed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return typed
