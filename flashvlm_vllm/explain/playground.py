# SPDX-License-Identifier: Apache-2.0
"""The playground page: one HTML file that calls the server it came from.

The page contains no data and no API key, so it is served without a key, like ``/health``. The
routes that it calls are under ``/v1`` and require vLLM's API key.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

PATH = "/flashvlm"
PAGE = Path(__file__).with_name("playground.html")


def attach(app: FastAPI) -> None:
    """Serve the page at ``PATH`` if ``--visual-playground`` is set."""
    if not getattr(app.state.args, "visual_playground", False):
        return
    text = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # Browsers must load it again each time, because it must match the server's version.
        "Cache-Control": "no-cache",
    }

    async def playground() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    app.add_api_route(PATH, playground, methods=["GET", "HEAD"], include_in_schema=False)


def content_security_policy(page: str) -> str:
    """Return a content security policy for ``page`` that blocks injected scripts and styles.

    Its script and its style are allowed by their hashes. The page may call its own server and show
    pictures from its own memory; everything else is blocked.
    """
    directives = {
        "default-src": "'none'",
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hash(page: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"the page must have one <{tag}> without attributes; found {len(found)}")
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
