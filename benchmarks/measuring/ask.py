# SPDX-License-Identifier: Apache-2.0
"""One streamed chat call, timed from its first byte sent to its first token."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen


@dataclass(frozen=True)
class Reply:
    """What came back, and when."""

    text: str
    ttft: float
    """Seconds until the first token."""
    seconds: float
    """Until the last."""
    prompt_tokens: int
    visual_tokens: int | None
    """Kept ones, as the plugin counts them; None: the server has no plugin."""


def user(text: str, image: str | None = None) -> dict[str, Any]:
    """Make a user's message; the image is a URL."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return {"role": "user", "content": parts}


def ask(
    url: str, model: str, messages: Sequence[dict[str, Any]], tokens: int, **fields: Any
) -> Reply:
    """Get an answer of exactly so many tokens; ``fields`` go into the request as they are.

    Raises:
        RuntimeError: no token came back.
    """
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    request = Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    words: list[str] = []
    usage: dict[str, Any] = {}
    ttft = 0.0
    started = time.perf_counter()
    with urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if choice["delta"].get("content"):
                    ttft = ttft or time.perf_counter() - started
                    words.append(choice["delta"]["content"])
    if not words or not usage:
        raise RuntimeError("the server sent no answer")
    return Reply(
        "".join(words).strip(),
        ttft,
        time.perf_counter() - started,
        usage["prompt_tokens"],
        usage.get("visual_tokens", {}).get("kept"),
    )
