# SPDX-License-Identifier: Apache-2.0
"""A middleware as an operator may configure one: adds a header to every response."""

from typing import Any

HEADER = "x-witness"


class AddHeader:
    """Adds a header to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def mark(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (HEADER.encode(), b"passed")]
            await send(message)

        await self.app(scope, receive, mark)
