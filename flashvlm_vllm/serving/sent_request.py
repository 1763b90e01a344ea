# SPDX-License-Identifier: Apache-2.0
"""The HTTP request as the client sent it.

vLLM converts the requests of some routes (``/v1/messages``) before it renders them, without the
fields that it does not know, and never passes on headers. So they are stored in a context variable
of the request's task until its prompt is rendered.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from flashvlm_vllm.request.header import BUDGET_HEADER, read_header
from flashvlm_vllm.request.read_request import VisualRequest, read_request

_HEADER = BUDGET_HEADER.lower().encode()


@dataclass
class _Sent:
    headers: tuple[str, ...]
    """Values of the budget header."""
    model: Any = None
    """The typed request; ``None`` on vLLM's own routes, which pass theirs to the renderer."""


_sent: ContextVar[_Sent | None] = ContextVar("flashvlm_sent_request", default=None)


class KeepSentRequest:
    """ASGI middleware that keeps a request's budget header until the response has ended.

    The value is checked when a prompt is rendered, so that a route that renders none ignores it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Keep the header of a POST request; pass every request on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        values = (value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER)
        token = _sent.set(_Sent(tuple(values)))
        try:
            await self.app(scope, receive, send)
        finally:
            _sent.reset(token)


def keep_model(request: Any) -> None:
    """Keep a route's typed request: it has the visual fields, a request converted from it not."""
    sent = _sent.get()
    if sent is not None:
        sent.model = request


def sent_model(request: Any) -> Any:
    """Return the typed request from which ``request`` was made, which may be ``request`` itself."""
    sent = _sent.get()
    return request if sent is None or sent.model is None else sent.model


def has_header() -> bool:
    """Return whether the request has a budget header."""
    sent = _sent.get()
    return sent is not None and bool(sent.headers)


def read_sent_request(request: Any) -> VisualRequest:
    """Return what the client asks: by the fields of its request, or else by the header.

    Args:
        request: the request that vLLM renders.

    Raises:
        FieldError: a field or the header is not valid; the message says what is allowed.

    """
    asked = read_request(sent_model(request))
    sent = _sent.get()
    if sent is None or not sent.headers:
        return asked
    # Checked even where a field takes precedence: a client learns of a bad header at once.
    budget = read_header(sent.headers)
    return asked if asked.has_budget else replace(asked, has_budget=True, budget=budget)
