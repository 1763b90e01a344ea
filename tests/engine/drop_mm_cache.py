# SPDX-License-Identifier: Apache-2.0
"""A middleware that has the engine, and not the API process, forget the pixels it was sent.

So it is after a client left at the wrong moment; here it is so at will.
"""

from typing import Any

PATH = "/forget"


class Forgetful:
    """Answers ``PATH`` itself and passes everything else on."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await scope["app"].state.engine_client.engine_core.reset_mm_cache_async()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)
