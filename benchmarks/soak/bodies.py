# SPDX-License-Identifier: Apache-2.0
"""Writes one conversation as the body of each route."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.measuring.servers import MODEL_NAME

CHAT: Final = "/v1/chat/completions"
BATCH: Final = "/v1/chat/completions/batch"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
TOKENIZE: Final = "/tokenize"
EXPLAIN: Final = "/v1/visual_tokens"

IMAGES_ONLY: Final = (RESPONSES, MESSAGES)
"""Routes whose format has no videos, and where content parts take no fields."""


@dataclass(frozen=True)
class Medium:
    """An image or a video in a message."""

    url: str
    """A ``data:`` URL."""
    is_video: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields beside the URL, such as a budget of its own."""


@dataclass(frozen=True)
class Turn:
    """A message."""

    text: str
    media: tuple[Medium, ...] = ()
    role: str = "user"


def body_of(path: str, turns: Sequence[Turn], tokens: int) -> dict[str, Any]:
    """Write a conversation as the body of a request.

    Args:
        path: of the route.
        turns: the messages; the last one is the user's.
        tokens: the most tokens of the answer.

    """
    if path == RESPONSES:
        return {
            "model": MODEL_NAME,
            "input": [{"role": each.role, "content": _input(each)} for each in turns],
            "max_output_tokens": tokens,
            "temperature": 0,
        }
    if path == MESSAGES:
        return {
            "model": MODEL_NAME,
            "messages": [{"role": each.role, "content": _blocks(each)} for each in turns],
            "max_tokens": tokens,
            "temperature": 0,
        }
    conversation = [{"role": each.role, "content": _parts(each)} for each in turns]
    if path == TOKENIZE:
        return {"model": MODEL_NAME, "messages": conversation}
    answer = {"model": MODEL_NAME, "max_tokens": tokens, "temperature": 0}
    # The margin of each word distinguishes a near tie from a wrong answer.
    answer |= {"logprobs": True, "top_logprobs": 2}
    if path == BATCH:
        other = [{"role": "user", "content": "hello"}]
        return {**answer, "messages": [conversation, other]}
    return {**answer, "messages": conversation}


def _parts(turn: Turn) -> str | list[dict[str, Any]]:
    if turn.role != "user":
        return turn.text
    kinds = [("video_url" if each.is_video else "image_url", each) for each in turn.media]
    return [
        *({"type": kind, kind: {"url": each.url}, **each.settings} for kind, each in kinds),
        {"type": "text", "text": turn.text},
    ]


def _input(turn: Turn) -> str | list[dict[str, Any]]:
    if turn.role != "user":
        return turn.text
    return [
        *({"type": "input_image", "image_url": each.url, "detail": "auto"} for each in turn.media),
        {"type": "input_text", "text": turn.text},
    ]


def _blocks(turn: Turn) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for each in turn.media:
        kind, _, data = each.url.removeprefix("data:").partition(";base64,")
        source = {"type": "base64", "media_type": kind, "data": data}
        blocks.append({"type": "image", "source": source})
    return [*blocks, {"type": "text", "text": turn.text}]
