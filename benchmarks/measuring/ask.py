# SPDX-License-Identifier: Apache-2.0
"""One streamed chat request, timed until its first and its last token."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen


@dataclass(frozen=True)
class Reply:
    """An answer with its times."""

    text: str
    ttft: float
    """Seconds until the first token."""
    seconds: float
    """Seconds until the last token."""
    prompt_tokens: int
    visual_tokens: int | None
    """Kept visual tokens, as the plugin reports them; None: the server has no plugin."""
    cached_tokens: int = 0
    """Prompt tokens from the prefix cache; needs ``--enable-prompt-tokens-details``."""

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed for this request."""
        return self.prompt_tokens - self.cached_tokens


def user(text: str, image: str | None = None) -> dict[str, Any]:
    """Return a user's message; the image is a URL."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return {"role": "user", "content": parts}


def streamed(
    model: str, messages: Sequence[dict[str, Any]], tokens: int, fields: dict[str, Any]
) -> dict[str, Any]:
    """Return the body of a streamed, greedy request for exactly ``tokens`` tokens."""
    return {
        "model": model,
        "messages": list(messages),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def event_of(line: bytes) -> dict[str, Any]:
    """Return the event in a line of a stream; without one, an empty one."""
    if not line.startswith(b"data: {"):
        return {}
    event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return event


def words_of(event: dict[str, Any]) -> list[str]:
    """Return the text of an event's choices."""
    texts = (choice["delta"].get("content") for choice in event.get("choices", ()))
    return [text for text in texts if text]


def ask(
    url: str, model: str, messages: Sequence[dict[str, Any]], tokens: int, **fields: Any
) -> Reply:
    """Get an answer of exactly ``tokens`` tokens; ``fields`` are added to the request.

    Raises:
        RuntimeError: no token came back.
    """
    request = Request(
        f"{url}/v1/chat/completions",
        json.dumps(streamed(model, messages, tokens, fields)).encode(),
        {"Content-Type": "application/json"},
    )
    words: list[str] = []
    usage: dict[str, Any] = {}
    ttft = 0.0
    started = time.perf_counter()
    with urlopen(request, timeout=600) as response:
        for line in response:
            event = event_of(line)
            usage = event.get("usage") or usage
            if new := words_of(event):
                ttft = ttft or time.perf_counter() - started
                words += new
    if not words or not usage:
        raise RuntimeError("the server sent no answer")
    return Reply(
        "".join(words).strip(),
        ttft,
        time.perf_counter() - started,
        usage["prompt_tokens"],
        usage.get("visual_tokens", {}).get("kept"),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )
