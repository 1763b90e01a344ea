# SPDX-License-Identifier: Apache-2.0
"""The requests of a soak: a finite, seeded set, which a server without load gets first."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from benchmarks.soak.bodies import (
    BATCH,
    CHAT,
    EXPLAIN,
    IMAGES_ONLY,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    Medium,
    Turn,
    body_of,
)
from benchmarks.soak.pictures import HUGE, SMALL, VIDEO, new_picture, picture, words
from flashvlm_vllm.selection.registry import BUILT_IN

NOT_SAID: Final = "not said"
BUDGETS: Final = (
    *(NOT_SAID, NOT_SAID, None, 1, 8, 32, 64, 200, 575, 576, 10**6, 0.001, 0.1, 0.5, 0.999),
    *("fit", {"total": 5}, {"total": 100}, {"total": 10**6}),
)
OWN_BUDGETS: Final = (None, 1, 16, 300, 0.2)
"""Budgets of one image, beside its URL."""
POSITIONS: Final = (NOT_SAID, "kept", "closed")
STEERING: Final = (NOT_SAID, "message", "latest", "own")
WORDS: Final = (1, 3, 8, 20, 60, 300, 1000, 2000, 4000)
"""Lengths of questions, in words of one token each."""
HEADER: Final = "X-Visual-Budget"
SMALLEST_CLIP: Final = 8
"""The smallest number of tokens that is asked of a video: one each time step is the least."""


@dataclass(frozen=True)
class Call:
    """One request with a known answer."""

    name: str
    path: str
    body: dict[str, Any] = field(compare=False)
    is_huge: bool = False
    """An image of 64 megapixels: only one at a time, so that peaks of memory can be compared."""

    is_pruned: bool = False
    """It has an image and a budget."""

    takes_default: bool = False
    """It has an image and names no budget, so the server may give it one under load."""

    headers: dict[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def content(self) -> bytes:
        """The body as sent."""
        return json.dumps(self.body).encode()

    @cached_property
    def streamed(self) -> bytes:
        """The body of a streamed chat request."""
        more = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({**self.body, **more}).encode()

    def with_budget(self, budget: int) -> "Call":
        """Return the same request with a budget."""
        return replace(
            self,
            name=f"{self.name}, with {budget}",
            body={**self.body, "visual_budget": budget},
            takes_default=False,
        )


def finite_calls(
    count: int, *, seed: int = 0, huge: bool = True, videos: bool = False
) -> list[Call]:
    """Return the set: every image, option and length of question in turn, mixed.

    Args:
        count: how many; 120 or more for everything to occur.
        seed: of the mixture.
        huge: images of 64 megapixels are among them.
        videos: videos are among them.

    """
    chance = random.Random(seed)

    def endless(values: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from chance.sample(list(values), len(values))

    pictures, budgets = endless(SMALL), endless(BUDGETS)
    lengths, methods = endless(WORDS), endless([NOT_SAID, *BUILT_IN])
    positions, steering = endless(POSITIONS), endless(STEERING)
    paths = endless([CHAT] * 8 + [RESPONSES, BATCH, TOKENIZE, MESSAGES])
    images = endless([0, 1, 1, 1, 1, 1, 1, 2, 2, 3])
    own = endless(OWN_BUDGETS)
    calls = []
    for number in range(count):
        path = next(paths)
        budget = next(budgets)
        length = next(lengths)
        is_huge = huge and number % 40 == 7
        names = [HUGE] if is_huge else list(itertools.islice(pictures, next(images)))
        media = [Medium(picture(each)) for each in names]
        if videos and number % 6 == 2 and path not in IMAGES_ONLY:
            names, media = [VIDEO], [Medium(picture(VIDEO), is_video=True)]
            budget = at_least(budget, SMALLEST_CLIP)
        elif number % 5 == 3 and media and path not in IMAGES_ONLY:
            media[0] = replace(media[0], settings={"visual_budget": next(own)})
        elif number % 30 == 11:
            # More than the context holds, so that "fit" has to prune.
            names, budget, length = list(itertools.islice(pictures, 5)), "fit", max(WORDS)
            media = [Medium(picture(each)) for each in names]
        turns = [Turn(words(length, seed=number), tuple(media))]
        if number % 4 == 1:
            turns = [*history(number, next(pictures)), replace(turns[0], text=words(8, number))]
        given = {
            "visual_selector": next(methods),
            "visual_positions": next(positions),
            "visual_steering": next(steering),
        }
        if number % 9 == 4:
            given["visual_query"] = words(number % 4, seed=number + 1)
        settings, headers = sent(number, path, budget, given)
        has_media = any(turn.media for turn in turns)
        calls.append(
            Call(
                name=f"{number} {path} {names} {budget}, {len(turns)} messages",
                path=path,
                body=body_of(path, turns, chance.choice([1, 4, 8, 8, 16, 16, 48])) | settings,
                is_huge=is_huge,
                is_pruned=has_media and budget not in (NOT_SAID, None),
                takes_default=has_media and budget == NOT_SAID,
                headers=headers,
            )
        )
    return calls


def sent(
    number: int, path: str, budget: Any, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields and headers of a call: its options are fields, ``metadata`` or a header."""
    settings = {name: value for name, value in given.items() if value != NOT_SAID}
    if budget == NOT_SAID:
        return settings, {}
    if number % 12 == 7:
        return settings, {HEADER: written(budget, none="off")}
    if number % 12 == 5 and path != MESSAGES:
        texts = {name: str(value) for name, value in settings.items()}
        return {"metadata": {"visual_budget": written(budget, none="null"), **texts}}, {}
    return settings | {"visual_budget": budget}, {}


def history(number: int, name: str) -> list[Turn]:
    """Return the beginning of a conversation about an image."""
    first = Turn(words(3 + number % 7, seed=-number), (Medium(picture(name)),))
    return [first, Turn(words(5, seed=number + 2), role="assistant")]


def at_least(budget: Any, least: int) -> Any:
    """Raise a number of tokens to ``least``; other budgets stay."""
    if isinstance(budget, dict):
        return {"total": max(budget["total"], least)}
    return max(budget, least) if isinstance(budget, int) else budget


def written(budget: Any, none: str) -> str:
    """Write a budget as text, for the header and for ``metadata``."""
    if budget is None:
        return none
    return json.dumps(budget) if isinstance(budget, dict) else str(budget)


def explained(calls: Sequence[Call]) -> list[Call]:
    """Return requests to the explain route for the pruned chat requests."""
    return [
        replace(
            call,
            name=f"{call.name} explained",
            path=EXPLAIN,
            body={**call.body, "logprobs": False, "top_logprobs": 0},
        )
        for call in calls
        if call.path == CHAT and call.is_pruned and not call.is_huge
    ]


def fresh_call(number: int) -> Call:
    """Return a request with a new image; equal numbers give equal requests."""
    chance = random.Random(f"fresh {number}")
    url = new_picture(chance)
    question = words(chance.choice([1, 4, 12, 40]), seed=-number)
    settings: dict[str, Any] = {"visual_budget": chance.choice([8, 64, 200, 0.25, None])}
    if chance.random() < 0.5:
        settings["visual_selector"] = chance.choice(list(BUILT_IN))
    if chance.random() < 0.3:
        settings["visual_positions"] = "closed"
    body = body_of(CHAT, [Turn(question, (Medium(url),))], 8) | settings
    return Call(f"new {number} {settings}", CHAT, body)
