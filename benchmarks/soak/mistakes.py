# SPDX-License-Identifier: Apache-2.0
"""Invalid requests, with the status and message that each must get."""

import json
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.measuring.servers import MODEL_NAME
from benchmarks.soak.calls import BATCH, CHAT, RESPONSES, TOKENIZE, picture


@dataclass(frozen=True)
class Mistake:
    """A request, the status it must get, and a word of the message."""

    name: str
    path: str
    content: bytes
    status: int
    word: str


def _chat(url: str = "", **fields: Any) -> bytes:
    url = url or picture("cat")
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hello"}]
    body = {"model": MODEL_NAME, "max_tokens": 4, "messages": [{"role": "user", "content": parts}]}
    return json.dumps({**body, **fields}).encode()


def mistakes() -> list[Mistake]:
    """Return one request of each kind."""
    good = picture("cat").split(",", 1)[1]
    cut = f"data:image/jpeg;base64,{good[: len(good) // 2 // 4 * 4]}"
    too_long = "dog " * 20_000
    return [
        Mistake("budget 0", CHAT, _chat(visual_budget=0), 400, "visual_budget"),
        Mistake("budget 1.0", CHAT, _chat(visual_budget=1.0), 400, "ambiguous"),
        Mistake("budget text", CHAT, _chat(visual_budget="64"), 400, "visual_budget"),
        Mistake("budget list", BATCH, _chat(visual_budget=[1]), 400, "visual_budget"),
        Mistake(
            "metadata", CHAT, _chat(metadata={"visual_budget": "many"}), 400, "metadata.visual_bu"
        ),
        Mistake(
            "selector", CHAT, _chat(visual_budget=9, visual_selector="best"), 400, "unknown select"
        ),
        Mistake("query", CHAT, _chat(visual_budget=9, visual_query=5), 400, "visual_query"),
        Mistake(
            "processor", CHAT, _chat(mm_processor_kwargs={"visual_budget": 9}), 400, "--trust-req"
        ),
        Mistake("no JSON", CHAT, b'{"model": ', 400, "JSON"),
        Mistake("no messages", CHAT, b"{}", 400, "messages"),
        Mistake("model", CHAT, _chat(model="another"), 404, "another"),
        Mistake("base64", CHAT, _chat("data:image/png;base64,%%%%"), 400, "error"),
        Mistake("no image", CHAT, _chat("data:image/png;base64,aGVsbG8="), 400, "error"),
        Mistake("cut image", CHAT, _chat(cut), 400, "error"),
        # As stock vLLM answers it; the file is not opened.
        Mistake("a file", CHAT, _chat("file:///etc/hostname"), 500, "--allowed-local-media-path"),
        Mistake("too long", CHAT, _chat(messages=[_user(too_long)]), 400, "maximum"),
        Mistake(
            "responses",
            RESPONSES,
            json.dumps({"model": MODEL_NAME, "input": "hello", "visual_budget": -1}).encode(),
            400,
            "visual_budget",
        ),
        Mistake("tokenize", TOKENIZE, _chat(visual_budget=0), 400, "visual_budget"),
    ]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


MISTAKES: Final = mistakes()
