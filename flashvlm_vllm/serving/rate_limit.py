# SPDX-License-Identifier: Apache-2.0
"""Limits for an expensive route: body size, requests per minute, and concurrent requests."""

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from flashvlm_vllm.request.refusal import Reason
from flashvlm_vllm.serving import metrics

_MINUTE = 60.0


class Limits:
    """Limits of one route in one API process."""

    def __init__(
        self,
        per_minute: int,
        at_once: int,
        largest_body: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the limits.

        Args:
            per_minute: most requests in any 60 seconds.
            at_once: most concurrent requests.
            largest_body: most bytes of a request body.
            now: clock in seconds.

        """
        self.per_minute = per_minute
        self.at_once = at_once
        self.largest_body = largest_body
        self._now = now
        self._started: deque[float] = deque()
        self._running = 0

    def enter(self) -> int:
        """Begin a request.

        Returns:
            0 if the request may run; otherwise the seconds after which to try again, and `leave`
            must not be called.

        """
        now = self._now()
        while self._started and now - self._started[0] >= _MINUTE:
            self._started.popleft()
        if len(self._started) >= self.per_minute:
            return max(1, math.ceil(_MINUTE - (now - self._started[0])))
        if self._running >= self.at_once:
            return 1
        self._started.append(now)
        self._running += 1
        return 0

    def leave(self) -> None:
        """End a request for which `enter` returned 0."""
        self._running -= 1


def limited_route(limits: Limits) -> type[APIRoute]:
    """Return a route class that checks ``limits`` before a request body is parsed."""

    class LimitedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def limited(request: Request) -> Response:
                if _declared_length(request) > limits.largest_body:
                    return _too_large(limits)
                measured = Request(request.scope, _measured(request, limits))
                try:
                    # Read the body before the request counts as running, so that slow clients do
                    # not block others.
                    await measured.body()
                except _TooLarge:
                    return _too_large(limits)
                except ClientDisconnect:
                    return Response(status_code=HTTPStatus.BAD_REQUEST)
                wait = limits.enter()
                if wait:
                    return _too_many(limits, wait)
                try:
                    return await handle(measured)
                finally:
                    limits.leave()

            return limited

    return LimitedRoute


class _TooLarge(Exception):
    """The body is larger than its declared length."""


def _declared_length(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() else 0


def _measured(request: Request, limits: Limits) -> Callable[[], Awaitable[Any]]:
    seen = 0

    async def receive() -> Any:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > limits.largest_body:
            raise _TooLarge
        return message

    return receive


def _too_large(limits: Limits) -> Response:
    return _refusal(
        Reason.TOO_LARGE,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request is larger than {limits.largest_body // 2**20} MiB, the most that this route "
        "takes",
    )


def _too_many(limits: Limits, wait: int) -> Response:
    response = _refusal(
        Reason.TOO_MANY,
        HTTPStatus.TOO_MANY_REQUESTS,
        f"this route answers {limits.per_minute} requests a minute and {limits.at_once} at a time; "
        f"try again in {wait} s",
    )
    response.headers["Retry-After"] = str(wait)
    return response


def _refusal(reason: Reason, status: HTTPStatus, message: str) -> Response:
    metrics.count_refusal(reason)
    error = ErrorInfo(message=message, type=status.phrase, code=status.value)
    return JSONResponse(ErrorResponse(error=error).model_dump(), status_code=status.value)
