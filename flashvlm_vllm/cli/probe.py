# SPDX-License-Identifier: Apache-2.0
"""Checks with client requests whether budgets work on a running server. Standard library only."""

import base64
import json
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

from flashvlm_vllm.request.budget import BUDGET

TOKENS = 16
"""The budget of the test request; every covered model has more tokens for the test image."""
_SIDE = 448

Answer = tuple[str, str]
"""A level (``ok``, ``note`` or ``wrong``) and a line of text."""


class _Refused(Exception):
    """The server answered with an error; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Server:
    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._root = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout

    def call(self, path: str, body: Any = None) -> str:
        """Call a route and return the body of the response.

        Raises:
            _Refused: the response is an error.
            OSError: there is no response.

        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return str(answer.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            raise _Refused(error.code, _message(error.read().decode(errors="replace"))) from None


def answers(url: str, key: str | None, timeout: float) -> Iterator[Answer]:
    """Check a server, and yield findings; stops at the first one that prevents further checks.

    Args:
        url: the server's URL, with or without ``/v1``.
        key: its API key, if it needs one.
        timeout: seconds per call.

    """
    if not url.startswith(("http://", "https://")):
        yield "wrong", f"server: {url} is not a URL; allowed is http://HOST:PORT or https://..."
        return
    server = _Server(url, key, timeout)
    try:
        try:
            server.call("/health")
            yield "ok", "server: /health answers"
        except _Refused as refused:
            # A gateway may not forward the route; a server whose engine died answers 503.
            level = "wrong" if refused.status >= 500 else "note"
            yield level, f"server: /health answers {refused.status}; see the server's log"
        model = _model(server)
        yield "ok", f"server: serves {model}"
        yield from _budget(server, model)
        yield _metrics(server)
    except _Refused as refused:
        if refused.status in (401, 403):
            yield "wrong", "server: needs an API key; set --api-key or OPENAI_API_KEY"
        else:
            yield "wrong", f"server: answered {refused.status}: {refused}"
    except OSError as error:
        reason = getattr(error, "reason", error)
        yield "wrong", f"server: no answer from {url} ({reason}); check that it runs, and the port"
    except (ValueError, KeyError, IndexError, TypeError):
        yield "wrong", f"server: {url} does not answer like a vLLM server; check the port"


def _model(server: _Server) -> str:
    listed = json.loads(server.call("/v1/models"))
    return str(listed["data"][0]["id"])


def _budget(server: _Server, model: str) -> Iterator[Answer]:
    usage = _ask(server, model, {BUDGET: TOKENS})
    if usage is None:
        if _ask(server, model, {"metadata": {BUDGET: str(TOKENS)}}) is not None:
            yield (
                "wrong",
                f"budget: {BUDGET} does not reach the server, a proxy removes unknown fields; "
                f'send metadata={{"{BUDGET}": "{TOKENS}"}} instead, which works',
            )
        else:
            yield (
                "wrong",
                "budget: ignored, because the server does not use the plugin; start it with "
                "--plugins flashvlm, from an environment where it is installed",
            )
        return
    total, kept = usage["total"], usage["kept"]
    if kept == TOKENS < total:
        yield "ok", f"budget: {kept} of {total} visual tokens of a test image were kept"
    else:
        yield "wrong", f"budget: {TOKENS} tokens requested, but {kept} of {total} kept"


def _ask(server: _Server, model: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Send the test image; return ``usage.visual_tokens``, or ``None`` if it is missing."""
    url = f"data:image/png;base64,{base64.b64encode(_picture()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 1,
        **fields,
    }
    usage = json.loads(server.call("/v1/chat/completions", body))["usage"]
    counts: dict[str, Any] | None = usage.get("visual_tokens")
    return counts


def _metrics(server: _Server) -> Answer:
    try:
        page = server.call("/metrics")
    except _Refused as refused:
        return "note", f"metrics: /metrics answers {refused.status}; call the server directly"
    if "flashvlm_visual_tokens_seen_total" not in page:
        return "note", "metrics: /metrics has no metrics of flashvlm; call the server directly"
    return "ok", "metrics: /metrics has those of flashvlm"


def _picture() -> bytes:
    """Return the test image, a PNG of coloured squares."""
    rows = b"".join(
        b"\0" + b"".join(bytes(((x // 64) * 36, (y // 64) * 36, 128)) for x in range(_SIDE))
        for y in range(_SIDE)
    )
    header = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _message(text: str) -> str:
    """Return the message of an error response of any form."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        message = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        message = text
    return " ".join(str(message).split())[:300]
