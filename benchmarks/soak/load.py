# SPDX-License-Identifier: Apache-2.0
"""Clients with correct and faulty requests, and counts of the results."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from benchmarks.soak.bodies import CHAT
from benchmarks.soak.calls import Call, fresh_call
from benchmarks.soak.clients import Answer, LostError, ask, cancel, send_half, session, stream
from benchmarks.soak.expected import Expected
from benchmarks.soak.mistakes import MISTAKES, Mistake

SHARES: Final = {
    "not streamed": 36,
    "streamed": 22,
    "new image": 12,
    "explained": 4,
    "disconnected while reading": 8,
    "cancelled": 6,
    "disconnected while sending": 3,
    "invalid": 9,
}
"""Percentages of the kinds of requests."""
FAULTS: Final = ("disconnected while reading", "cancelled", "disconnected while sending", "invalid")
_SHOWN: Final = 400


@dataclass
class Counts:
    """Results of the requests so far."""

    requests: Counter[str] = field(default_factory=Counter)
    """By kind."""
    compared: int = 0
    """Answers, and beginnings of answers, that were compared with those without load."""
    near_ties: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    ended: int = 0
    """Requests that a killed server ended with an error or a closed connection."""
    new: dict[int, Answer] = field(default_factory=dict)
    """Answers to requests with new images, by number."""
    seconds: list[float] = field(default_factory=list)
    """Times of answers that were not streamed."""

    @property
    def total(self) -> int:
        """All requests."""
        return self.requests.total()

    @property
    def faults(self) -> dict[str, int]:
        """Faults injected, by kind."""
        return {name: self.requests[name] for name in FAULTS if self.requests[name]}

    def note(self, verdict: str, call: Call, quiet: Answer, loud: Answer, kind: str) -> None:
        """Count a verdict and record wrong answers."""
        self.compared += 1
        if verdict == "near tie":
            self.near_ties += 1
        elif verdict == "wrong":
            self.wrong.append(
                {
                    "call": call.name,
                    "kind": kind,
                    "at": round(time.time(), 1),
                    "expected": [quiet.status, quiet.counts, quiet.text[:_SHOWN]],
                    "got": [loud.status, loud.counts, loud.text[:_SHOWN]],
                    "leads": [round(lead, 5) for _, lead in quiet.margins],
                }
            )


class Load:
    """Clients that keep a server busy until `stop`."""

    def __init__(
        self,
        url: str,
        expected: Expected,
        *,
        clients: int,
        seed: int = 0,
        shares: Mapping[str, int] = SHARES,
        explained: Sequence[Call] = (),
    ) -> None:
        self.counts = Counts()
        self.in_flight = 0
        self.is_dying = False
        """Set once a process of the server was killed: errors are expected from then on."""
        self._url = url
        self._expected = expected
        self._calls = [call for call in expected.calls if call not in explained]
        self._streamed = [call for call in self._calls if call.path == CHAT]
        self._explained = list(explained)
        self._clients = clients
        self._seed = seed
        self._shares = {
            name: share for name, share in shares.items() if name != "explained" or explained
        }
        self._huge = asyncio.Semaphore(1)
        self._few = asyncio.Semaphore(2)
        self._over = asyncio.Event()
        self._number = 0

    def stop(self) -> None:
        """Let every client finish its request and send no more."""
        self._over.set()

    async def run(self) -> None:
        """Run the clients until `stop`."""
        async with session(self._url) as http, session(self._url, once=True) as other:
            await asyncio.gather(
                *(self._client(http, other, each) for each in range(self._clients))
            )

    async def _client(
        self, http: aiohttp.ClientSession, other: aiohttp.ClientSession, number: int
    ) -> None:
        chance = random.Random(self._seed * 1000 + number)
        kinds, weights = list(self._shares), list(self._shares.values())
        while not self._over.is_set():
            (kind,) = chance.choices(kinds, weights)
            self.counts.requests[kind] += 1
            name = kind
            self.in_flight += 1
            try:
                if kind == "invalid":
                    await self._mistake(other, chance.choice(MISTAKES))
                elif kind == "new image":
                    self._number += 1
                    name = f"new {self._number}"
                    await self._new(http, self._number)
                else:
                    calls = self._calls
                    if kind in ("streamed", "disconnected while reading"):
                        calls = self._streamed
                    elif kind == "explained":
                        calls = self._explained
                    call = chance.choice(calls)
                    name = f"{kind}: {call.name}"
                    if call.is_huge or kind == "explained":
                        # The explain route runs few requests at once.
                        async with self._huge if call.is_huge else self._few:
                            await self._act(http, kind, call, chance)
                    else:
                        await self._act(http, kind, call, chance)
            except LostError as error:
                if self.is_dying and not isinstance(error.__cause__, TimeoutError):
                    self.counts.ended += 1
                    continue
                at = round(time.time(), 1)
                self.counts.lost.append({"call": name, "at": at, "error": str(error)[:_SHOWN]})
                # Every request to a server that has ended is lost; a few are enough.
                await asyncio.sleep(0.5)
            finally:
                self.in_flight -= 1

    async def _act(
        self, http: aiohttp.ClientSession, kind: str, call: Call, chance: random.Random
    ) -> None:
        if kind in ("not streamed", "explained"):
            started = time.monotonic()
            answer = await ask(http, call)
            self.counts.seconds.append(time.monotonic() - started)
            self._judge(call, answer, kind)
        elif kind == "streamed":
            self._judge(call, await stream(http, call), kind)
        elif kind == "disconnected while reading":
            answer = await stream(http, call, leave_after=chance.randint(1, 8))
            is_whole = answer.counts is not None
            judge = self._expected.judge if is_whole else self._expected.judge_beginning
            verdict, quiet = judge(call, answer)
            self.counts.note(verdict, call, quiet, answer, kind)
        elif kind == "cancelled":
            await cancel(http, call, chance.choice([0.001, 0.01, 0.05, 0.2, 0.8, 2.0]))
        elif kind == "disconnected while sending":
            parts = urlsplit(self._url)
            await send_half(parts.hostname or "", parts.port or 0, call)

    def _judge(self, call: Call, answer: Answer, kind: str) -> None:
        if self.is_dying and answer.status >= 500:
            self.counts.ended += 1
        else:
            verdict, quiet = self._expected.judge(call, answer)
            self.counts.note(verdict, call, quiet, answer, kind)

    async def _new(self, http: aiohttp.ClientSession, number: int) -> None:
        call = fresh_call(number)
        self.counts.new[number] = await ask(http, call)

    async def _mistake(self, http: aiohttp.ClientSession, mistake: Mistake) -> None:
        try:
            async with http.post(
                mistake.path, data=mistake.content, headers=mistake.headers
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LostError(f"{type(error).__name__}: {error}") from error
        if self.is_dying and response.status >= 500:
            self.counts.ended += 1
            return
        self.counts.compared += 1
        if response.status != mistake.status or mistake.word not in text:
            self.counts.wrong.append(
                {
                    "call": mistake.name,
                    "kind": "invalid",
                    "at": round(time.time(), 1),
                    "expected": [mistake.status, mistake.word],
                    "got": [response.status, text[:_SHOWN]],
                }
            )


async def ask_in_turn(url: str, calls: Sequence[Call]) -> dict[Call, Answer]:
    """Send requests one after the other.

    Raises:
        LostError: one was not answered.
    """
    async with session(url) as http:
        return {call: await ask(http, call) for call in calls}


async def routes(url: str) -> dict[str, Any]:
    """Return the paths of the server's OpenAPI description."""
    async with session(url) as http, http.get("/openapi.json") as response:
        return dict(json.loads(await response.text())["paths"])
