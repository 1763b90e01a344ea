# SPDX-License-Identifier: Apache-2.0
"""Actions of clients: wait for an answer, read a stream, disconnect, or cancel."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from benchmarks.soak.bodies import CHAT, MESSAGES, RESPONSES, TOKENIZE
from benchmarks.soak.calls import Call

PATIENCE: Final = 300.0
"""Seconds after which a request without an answer counts as lost."""


CACHED: Final = ("cache_read_input_tokens", "cache_creation_input_tokens")
"""What Anthropic's usage counts beside the other tokens of a prompt."""


@dataclass(frozen=True)
class Answer:
    """An answer."""

    status: int
    text: str = ""
    """All words; of an unsuccessful answer, its body."""
    counts: Any = None
    """Prompt tokens, words and visual tokens, as in the answer."""
    margins: tuple[tuple[str, float], ...] = ()
    """Each word with its log probability minus that of the second best."""


class LostError(Exception):
    """No answer: the connection broke, the stream has no end, or it took too long."""


def session(url: str, *, once: bool = False) -> aiohttp.ClientSession:
    """Open connections to one server; no two requests share one at a time.

    Args:
        url: of the server.
        once: a connection is closed after one request. vLLM closes it without announcing it after
            an answer with 500, and the next request on it would be lost.

    """
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=PATIENCE),
        connector=aiohttp.TCPConnector(limit=0, force_close=once),
        headers={"Content-Type": "application/json"},
        read_bufsize=2**20,
    )


async def ask(http: aiohttp.ClientSession, call: Call) -> Answer:
    """Wait for the whole answer.

    Raises:
        LostError: there is none.
    """
    try:
        async with http.post(call.path, data=call.content, headers=call.headers) as response:
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LostError(f"{type(error).__name__}: {error}") from error
    return read(call, response.status, text)


def read(call: Call, status: int, text: str) -> Answer:
    """Return the parts of an answer that must be the same every time."""
    if status != 200:
        return Answer(status, text)
    data = json.loads(text)
    usage = data.get("usage") or {}
    visual = usage.get("visual_tokens")
    if call.path == TOKENIZE:
        return Answer(status, "", data["count"])
    if call.path == RESPONSES:
        said = [part["text"] for item in data["output"] for part in item.get("content") or ()]
        counts = (usage["input_tokens"], usage["output_tokens"], visual)
        return Answer(status, "".join(said), counts)
    if call.path == MESSAGES:
        said = [block["text"] for block in data["content"]]
        prompt = usage["input_tokens"] + sum(usage.get(name) or 0 for name in CACHED)
        return Answer(status, "".join(said), (prompt, usage["output_tokens"], visual))
    if "choices" in data:
        said = [choice["message"]["content"] or "" for choice in data["choices"]]
        counts = (usage["prompt_tokens"], usage["completion_tokens"], visual)
        return Answer(status, "\n".join(said), counts, _margins(data["choices"][0]))
    return Answer(status, "", data)


def _margins(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    listed = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        (each["token"], each["top_logprobs"][0]["logprob"] - each["top_logprobs"][1]["logprob"])
        for each in listed
    )


async def stream(http: aiohttp.ClientSession, call: Call, leave_after: int | None = None) -> Answer:
    """Read a streamed chat answer.

    Args:
        http: connections to the server.
        call: a chat call.
        leave_after: events after which the client disconnects; None: it reads to the end.

    Raises:
        LostError: the stream was interrupted, or has no end.
    """
    assert call.path == CHAT
    said: list[str] = []
    counts = None
    events = 0
    try:
        async with http.post(call.path, data=call.streamed, headers=call.headers) as response:
            if response.status != 200:
                return Answer(response.status, await response.text())
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return Answer(200, "".join(said), counts)
                data = json.loads(line[6:])
                if "error" in data:
                    return Answer(int(data["error"].get("code") or 500), line.decode())
                said += [choice["delta"].get("content") or "" for choice in data["choices"]]
                if usage := data.get("usage"):
                    names = ("prompt_tokens", "completion_tokens", "visual_tokens")
                    counts = tuple(usage.get(name) for name in names)
                events += 1
                if events == leave_after:
                    response.close()
                    return Answer(200, "".join(said))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LostError(f"{type(error).__name__}: {error}") from error
    raise LostError("the stream ended without [DONE]")


async def cancel(http: aiohttp.ClientSession, call: Call, after: float) -> None:
    """Send a request and disconnect after some seconds, with or without an answer."""
    task = asyncio.create_task(ask(http, call))
    await asyncio.wait([task], timeout=after)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def send_half(host: str, port: int, call: Call) -> None:
    """Send the headers and half of the body of a request, and disconnect."""
    content = call.content
    _, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST {call.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in call.headers.items())
        + "\r\n"
    )
    writer.write(head.encode() + content[: len(content) // 2])
    await writer.drain()
    writer.close()
