# SPDX-License-Identifier: Apache-2.0
"""Closed-loop clients: each sends its next request after the answer to the previous one.

`bench` has the same loop from vLLM; its data sets need packages that a serving environment may
lack, and all of its requests have the same fields.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from benchmarks.measuring.ask import event_of, streamed, user, words_of
from benchmarks.measuring.pictures import picture
from benchmarks.measuring.servers import MODEL_NAME
from benchmarks.measuring.turn import Turn
from testing.photo import data_url

QUESTION: Final = "What is in this picture?"


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds from the first byte sent."""

    ttft: float
    seconds: float
    prompt_tokens: int
    output_tokens: int
    visual_tokens: dict[str, Any] | None
    """``usage.visual_tokens``; None from stock vLLM."""


class AnswerError(RuntimeError):
    """The server refused a request, or sent no token."""


class Pictures:
    """Any number of images, all different.

    They are parts of a few photographs with one pixel changed, so there are no cache hits, and
    making them is cheap.
    """

    def __init__(self, side: int, different: int) -> None:
        """Cut the parts out.

        Args:
            side: in pixels.
            different: how many parts.

        """
        self._parts = [picture(number, side) for number in range(different)]
        self._side = side
        self._drawn = 0

    def take(self, count: int) -> list[str]:
        """Return ``count`` new images as data URLs."""
        urls = []
        for _ in range(count):
            self._drawn += 1
            image = self._parts[self._drawn % len(self._parts)].copy()
            row, column = divmod(self._drawn, self._side)
            color = (self._drawn % 256, self._drawn // 256 % 256, 7)
            image.putpixel((column, row % self._side), color)
            urls.append(data_url(image, format="PNG"))
        return urls


async def stream(
    client: aiohttp.ClientSession, url: str, image: str, tokens: int, fields: dict[str, Any]
) -> Answer:
    """Send one chat request and read its stream.

    Raises:
        AnswerError: the server refused it, or sent no token.

    """
    others = {name: value for name, value in fields.items() if name != "question"}
    messages = [user(fields.get("question", QUESTION), image)]
    body = streamed(MODEL_NAME, messages, tokens, others)
    usage: dict[str, Any] = {}
    begun, first = time.perf_counter(), None
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise AnswerError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            event = event_of(line)
            if "error" in event:
                raise AnswerError(str(event)[:300])
            usage = event.get("usage") or usage
            if words_of(event) and first is None:
                first = time.perf_counter() - begun
    if first is None:
        raise AnswerError(f"no token came: {usage}")
    return Answer(
        first,
        time.perf_counter() - begun,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage.get("visual_tokens"),
    )


def session() -> aiohttp.ClientSession:
    """Open a session with as many connections as there are clients."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=120), connector=aiohttp.TCPConnector(limit=0)
    )


def closed_loop(
    url: str, images: Sequence[str], clients: int, tokens: int, fields: dict[str, Any]
) -> tuple[Turn, list[Answer]]:
    """Send a request for each image, from ``clients`` clients."""

    async def run() -> tuple[float, list[Answer]]:
        numbers, answers = iter(images), []

        async def one(client: aiohttp.ClientSession) -> None:
            for image in numbers:
                answers.append(await stream(client, url, image, tokens, fields))

        async with session() as client:
            begun = time.perf_counter()
            await asyncio.gather(*(one(client) for _ in range(clients)))
            return time.perf_counter() - begun, answers

    seconds, answers = asyncio.run(run())
    ttfts = tuple(each.ttft for each in answers)
    tpots = tuple(
        (each.seconds - each.ttft) / (each.output_tokens - 1)
        for each in answers
        if each.output_tokens > 1
    )
    return Turn(seconds, ttfts, tpots), answers


def asked_one_by_one(url: str, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[Answer]:
    """Send images with their fields one after the other, with one output token each."""

    async def run() -> list[Answer]:
        async with session() as client:
            return [await stream(client, url, image, 1, fields) for image, fields in requests]

    return asyncio.run(run())
