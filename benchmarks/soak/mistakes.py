# SPDX-License-Identifier: Apache-2.0
"""Invalid requests, with the status and message that each must get."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.measuring.servers import MODEL_NAME
from benchmarks.soak.bodies import (
    BATCH,
    CHAT,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    Medium,
    Turn,
    body_of,
)
from benchmarks.soak.calls import HEADER
from benchmarks.soak.pictures import picture


@dataclass(frozen=True)
class Mistake:
    """A request, the status it must get, and a word of the message."""

    name: str
    path: str
    content: bytes
    status: int
    word: str
    headers: Mapping[str, str] = field(default_factory=dict)


def _form(path: str, own: Mapping[str, Any] | None = None, **fields: Any) -> bytes:
    turn = Turn("hello", (Medium(picture("cat"), settings=own or {}),))
    return json.dumps(body_of(path, [turn], 4) | fields).encode()


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
        Mistake("messages", MESSAGES, _form(MESSAGES, visual_budget="all"), 400, "visual_budget"),
        Mistake("header", CHAT, _chat(), 400, HEADER, {HEADER: "many"}),
        Mistake(
            "part", CHAT, _form(CHAT, {"visual_budget": 0}, visual_budget=9), 400, "visual_budget"
        ),
        Mistake("total 0", CHAT, _chat(visual_budget={"total": 0}), 400, "total"),
        Mistake(
            "positions", CHAT, _chat(visual_budget=9, visual_positions="left"), 400, "visual_pos"
        ),
        Mistake(
            "steering", CHAT, _chat(visual_budget=9, visual_steering="all"), 400, "visual_steering"
        ),
    ]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


MISTAKES: Final = mistakes()
