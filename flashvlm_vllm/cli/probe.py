# SPDX-License-Identifier: Apache-2.0
"""Calls a running server as a client would, to see whether budgets work there. Stdlib only."""

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
"""The budget that is tried; every covered model has more tokens for the picture below."""
_SIDE = 448

Answer = tuple[str, str]
"""``ok``, ``note`` or ``wrong``, and a line of text."""


class _Refused(Exception):
    """The server answered, with an error; ``status`` is its number."""

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
        """Return the text of an answer.

        Raises:
            _Refused: the answer is an error.
            OSError: there is no answer.

        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return str(answer.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            raise _Refused(error.code, _message(error.read().decode(errors="replace"))) from None


def answers(url: str, key: str | None, timeout: float) -> Iterator[Answer]:
    """Look at a server; stops at what makes the rest pointless.

    Args:
        url: where it is, with or without ``/v1``.
        key: its API key, if it asks for one.
        timeout: seconds for each call.

    """
    if not url.startswith(("http://", "https://")):
        yield "wrong", f"server: {url} is no address; allowed is http://HOST:PORT or https://..."
        return
    server = _Server(url, key, timeout)
    try:
        try:
            server.call("/health")
            yield "ok", "server: /health answers"
        except _Refused as refused:
            # Gateways need not pass it on; an engine that died answers 503.
            level = "wrong" if refused.status >= 500 else "note"
            yield level, f"server: /health answers {refused.status}; its log says why"
        model = _model(server)
        yield "ok", f"server: serves {model}"
        yield from _budget(server, model)
        yield _metrics(server)
    except _Refused as refused:
        if refused.status in (401, 403):
            yield "wrong", "server: asks for a key; give it by --api-key or OPENAI_API_KEY"
        else:
            yield "wrong", f"server: answered {refused.status}: {refused}"
    except OSError as error:
        reason = getattr(error, "reason", error)
        yield "wrong", f"server: no answer from {url} ({reason}); is it up, is the port right?"
    except (ValueError, KeyError, IndexError, TypeError):
        yield "wrong", f"server: what answers at {url} does not speak like vLLM; is the port right?"


def _model(server: _Server) -> str:
    listed = json.loads(server.call("/v1/models"))
    return str(listed["data"][0]["id"])


def _budget(server: _Server, model: str) -> Iterator[Answer]:
    told = _ask(server, model, {BUDGET: TOKENS})
    if told is None:
        if _ask(server, model, {"metadata": {BUDGET: str(TOKENS)}}) is not None:
            yield (
                "wrong",
                f"budget: {BUDGET} does not arrive, something in between drops unknown fields; "
                f'send metadata={{"{BUDGET}": "{TOKENS}"}} instead, which does',
            )
        else:
            yield (
                "wrong",
                "budget: ignored; that server does not use the plugin: start it with "
                "--plugins flashvlm, from an environment where it is installed",
            )
        return
    total, kept = told["total"], told["kept"]
    if kept == TOKENS < total:
        yield "ok", f"budget: {kept} of a drawn picture's {total} visual tokens were kept"
    else:
        yield "wrong", f"budget: {TOKENS} tokens were asked for, {kept} of {total} kept"


def _ask(server: _Server, model: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Ask about a drawn picture; returns ``usage.visual_tokens``, ``None`` where it is missing."""
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
    told: dict[str, Any] | None = usage.get("visual_tokens")
    return told


def _metrics(server: _Server) -> Answer:
    try:
        page = server.call("/metrics")
    except _Refused as refused:
        return "note", f"metrics: /metrics answers {refused.status}; ask the server itself"
    if "flashvlm_visual_tokens_seen_total" not in page:
        return "note", "metrics: /metrics has none of flashvlm's; ask the server itself"
    return "ok", "metrics: flashvlm's are on /metrics"


def _picture() -> bytes:
    """Draw a picture of coloured squares, as PNG."""
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
    """Return what an error answer says, whatever its form."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        message = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        message = text
    return " ".join(str(message).split())[:300]
