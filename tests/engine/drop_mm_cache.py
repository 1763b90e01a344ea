# SPDX-License-Identifier: Apache-2.0
"""A middleware that drops the engine's cache of pixels, but not that of the API process.

The same state arises when a client disconnects at the wrong moment; here it is reproducible.
"""

from typing import Any

PATH = "/forget"


class DropCache:
    """Drops the cache on a request to ``PATH`` and passes other requests on."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await scope["app"].state.engine_client.engine_core.reset_mm_cache_async()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)
