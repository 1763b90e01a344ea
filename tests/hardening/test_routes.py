# SPDX-License-Identifier: Apache-2.0
"""Every route that this plugin adds or redefines keeps the protections of vLLM's own routes.

API keys, operators' middlewares, CORS and request ids apply; no URL is fetched that vLLM would
not fetch; and each route answers as its OpenAPI description says.
"""

import argparse
import copy
import http.server
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings

from flashvlm_vllm.endpoint import FlashVLMEndpoint
from flashvlm_vllm.serving.request_models import REQUEST_MODELS
from testing.photo import photo
from testing.server import Server
from tests.engine.conftest import REPOSITORY
from tests.engine.test_server import conversation
from tests.hardening import header_middleware

KEY = "a-key-of-this-test"
ORIGIN = "http://playground.test"
CHAT = "/v1/chat/completions"
BATCH = "/v1/chat/completions/batch"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
RENDER = "/v1/messages/render"
OF_ANTHROPIC = (MESSAGES, COUNT, RENDER)
EXPLAIN = "/v1/visual_tokens"
PAGE = "/flashvlm"
OPEN = {PAGE}
"""Served without a key, as ``/health`` is: a static page; the routes that it calls need the key."""


def our_routes() -> list[tuple[str, str]]:
    """Return method and path of every route of the endpoint plugin, with all options enabled."""
    app = FastAPI()
    app.state.args = argparse.Namespace(visual_explain_per_minute=60, visual_playground=True)

    async def placeholder(request: dict[str, Any], raw_request: Request) -> None: ...

    for path in REQUEST_MODELS:
        app.add_api_route(path, placeholder, methods=["POST"])
    # Compare the objects, not their ids: the id of a removed route may be reused.
    before = list(app.routes)
    FlashVLMEndpoint().attach_router(app)
    found = []
    for route in app.routes:
        if not any(route is each for each in before):
            assert isinstance(route, APIRoute), f"{route}: neither tested here nor in OpenAPI"
            found += [(method, route.path) for method in sorted(route.methods)]
    return found


ROUTES = our_routes()


class Listener:
    """A local web server that counts requests for pictures."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        buffer = io.BytesIO()
        photo("cat").resize((60, 40)).save(buffer, "PNG")
        picture, hits = buffer.getvalue(), self.hits

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hits.append(self.path)
                if self.path == "/moved.png":
                    self.send_response(302)
                    self.send_header("Location", f"http://localhost:{self.server.server_port}/x")  # type: ignore[attr-defined]
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Type", "image/png")
                self.send_header("Content-Length", str(len(picture)))
                self.end_headers()
                self.wfile.write(picture)

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def server(clip_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("guarded") / "log"
    options = (
        *("--plugins", "flashvlm", "--enable-scale-out", "--max-model-len", "1024"),
        *("--visual-explain-per-minute", "10000"),
        "--visual-playground",
        *("--api-key", KEY, "--enable-request-id-headers"),
        *("--middleware", f"{header_middleware.__name__}.{header_middleware.AddHeader.__name__}"),
        *("--allowed-origins", f'["{ORIGIN}"]'),
        *("--allowed-media-domains", "127.0.0.1"),
    )
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    with Server(clip_llava, options, log=log, environment=environment) as started:
        yield started


def body_of(path: str, server: Server, url: str | None = None) -> dict[str, Any]:
    """Return a request that the route answers with 200."""
    messages = conversation("a dog?", url) if url else conversation("a dog?")
    given = {"model": server.model, "visual_budget": 9, "temperature": 0}
    if path == RESPONSES:
        text = {"type": "input_text", "text": "a dog?"}
        picture = messages[0]["content"][0]["image_url"]["url"]
        parts = [{"type": "input_image", "image_url": picture, "detail": "auto"}, text]
        return {**given, "max_output_tokens": 4, "input": [{"role": "user", "content": parts}]}
    if path in OF_ANTHROPIC:
        address = messages[0]["content"][0]["image_url"]["url"]
        blocks = [{"type": "image", "source": {"type": "url", "url": address}}]
        asked = [{"role": "user", "content": [*blocks, {"type": "text", "text": "a dog?"}]}]
        return {**given, "max_tokens": 4, "messages": asked}
    if path == BATCH:
        return {**given, "max_tokens": 4, "messages": [messages]}
    return {**given, "max_tokens": 4, "messages": messages}


def call(server: Server, method: str, path: str, key: str | None = KEY, **more: Any) -> Any:
    headers = {"origin": ORIGIN, "x-request-id": "the-test", **more.pop("headers", {})}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    if method == "POST" and "json" not in more:
        more["json"] = body_of(path, server)
    return httpx.request(method, server.url + path, headers=headers, timeout=120, **more)


def test_the_plugin_attaches_the_expected_routes() -> None:
    paths = {path for _, path in ROUTES}
    assert paths == {CHAT, BATCH, RESPONSES, *OF_ANTHROPIC, EXPLAIN, PAGE}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_requests_without_the_key_are_refused(server: Server, method: str, path: str) -> None:
    for key in (None, "another", KEY.upper()):
        answer = call(server, method, path, key)
        if path in OPEN:
            assert answer.status_code == 200
            assert KEY not in answer.text
        else:
            assert answer.status_code == 401
            assert answer.json() == {"error": "Unauthorized"}
    # Another spelling of the path does not bypass the key.
    for odd in (f"/{path}", f"{path}/", path.replace("/v1", "/./v1"), path.upper()):
        if path not in OPEN:
            assert call(server, method, odd, None).status_code in {401, 404, 307, 405}
    assert call(server, method, path).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_middlewares_cors_and_request_ids_apply(server: Server, method: str, path: str) -> None:
    answer = call(server, method, path)
    assert answer.headers[header_middleware.HEADER] == "passed"
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["x-request-id"] == "the-test"
    elsewhere = call(server, method, path, headers={"origin": "http://elsewhere.test"})
    assert elsewhere.headers.get("access-control-allow-origin") is None


TAKING = [path for method, path in ROUTES if method == "POST"] + ["/tokenize", "/invocations"]


@pytest.mark.parametrize("path", TAKING)
def test_media_urls_are_restricted_as_in_vllm(
    server: Server, listener: Listener, tmp_path: Path, path: str
) -> None:
    def status(url: str) -> int:
        # A new connection, because vLLM may close it.
        return int(call(server, "POST", path, json=body_of(path, server, url)).status_code)

    port, hits = listener.port, listener.hits
    hits.clear()
    assert status(f"http://127.0.0.1:{port}/{path.strip('/')}.png") == 200
    assert len(hits) == 1, "once, and by nobody else"
    hits.clear()
    for refused in (
        f"http://localhost:{port}/a.png",
        f"http://127.0.0.1.test:{port}/a.png",
        f"http://127.0.0.1@localhost:{port}/a.png",
        f"http://localhost:{port}\\@127.0.0.1/a.png",
        f"ftp://127.0.0.1:{port}/a.png",
    ):
        assert status(refused) >= 400, refused
    assert hits == []
    assert status(f"http://127.0.0.1:{port}/moved.png") >= 400
    assert hits == ["/moved.png"], "it is not followed to another host"
    secret = tmp_path / "secret.png"
    photo("cat").save(secret)
    answer = call(server, "POST", path, json=body_of(path, server, f"file://{secret}"))
    # vLLM itself answers 500: its error handler does not handle its loader's exception.
    assert answer.status_code in {400, 500}
    assert "allowed-local-media-path" in answer.text


FIELDS = ("visual_budget", "visual_query", "visual_selector", "budgets")
DRAWN: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="module")
def description(server: Server) -> Any:
    """Return the server's OpenAPI description."""
    return httpx.get(f"{server.url}/openapi.json", timeout=60).json()


def our_part(description: Any, path: str) -> Any:
    """Return the description of one route with only the plugin's fields in its request."""
    operation = copy.deepcopy(description["paths"][path]["post"])
    media = operation["requestBody"]["content"]["application/json"]
    name = media["schema"]["$ref"].rsplit("/", 1)[1]
    properties = description["components"]["schemas"][name]["properties"]
    ours = {field: properties[field] for field in FIELDS if field in properties}
    media["schema"] = {"type": "object", "properties": ours, "additionalProperties": False}
    return {**description, "paths": {path: {"post": operation}}}


@pytest.mark.parametrize("path", [CHAT, BATCH, RESPONSES, *OF_ANTHROPIC, EXPLAIN])
def test_documented_field_values_are_answered_without_server_errors(
    server: Server, description: Any, path: str
) -> None:
    """Valid requests in which schemathesis draws the plugin's fields from OpenAPI."""
    schema = schemathesis.openapi.from_dict(our_part(description, path))
    statuses: list[int] = []

    @settings(max_examples=30, **DRAWN)
    @given(case=schema[path]["POST"].as_strategy())
    def check(case: Any) -> None:
        fields = case.body if isinstance(case.body, dict) else {}
        answer = call(server, "POST", path, json={**body_of(path, server), **fields})
        statuses.append(answer.status_code)
        assert answer.status_code in {200, 400}, answer.text
        if answer.status_code == 400:
            # What OpenAPI cannot express: the known selectors, that 64.0 is not an integer, and
            # that an explanation needs a budget.
            assert re.search("selector|ambiguous|whole number|nothing to explain", answer.text)

    check()
    assert {200, 400} == set(statuses)


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, BATCH, RESPONSES, *OF_ANTHROPIC, EXPLAIN])
def test_any_body_gets_a_documented_status(server: Server, description: Any, path: str) -> None:
    """Whole requests drawn by schemathesis, most of which are invalid."""
    schema = schemathesis.openapi.from_dict(
        {**description, "paths": {path: {"post": description["paths"][path]["post"]}}}
    )
    statuses: list[int] = []

    @settings(max_examples=40, **DRAWN)
    @given(case=schema[path]["POST"].as_strategy())
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict):
            # Short, because a drawn request may ask for the maximum output.
            body = {**body, "max_tokens": 2, "max_output_tokens": 2, "n": 1, "stream": False}
            body.pop("max_completion_tokens", None)
        answer = call(server, "POST", path, json=body)
        statuses.append(answer.status_code)
        assert answer.status_code in {200, 400, 404, 422, 429}, answer.text

    check()
    assert 400 in statuses
    assert call(server, "POST", path).status_code == 200
