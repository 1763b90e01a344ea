# SPDX-License-Identifier: Apache-2.0
"""The requests of a soak: a finite, seeded set, which a server without load gets first."""

import base64
import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Final

from PIL import Image

from benchmarks.measuring.servers import MODEL_NAME
from flashvlm_vllm.selection.registry import BUILT_IN
from testing.photo import photo
from testing.tiny.llava import SENTENCES

CHAT: Final = "/v1/chat/completions"
BATCH: Final = "/v1/chat/completions/batch"
RESPONSES: Final = "/v1/responses"
TOKENIZE: Final = "/tokenize"
EXPLAIN: Final = "/v1/visual_tokens"

NOT_SAID: Final = "not said"
BUDGETS: Final = (NOT_SAID, None, 1, 8, 32, 64, 200, 575, 576, 10**6, 0.001, 0.1, 0.5, 0.999)
WORDS: Final = (1, 3, 8, 20, 60, 300, 1000, 2000, 4000)
"""Lengths of questions, in words of one token each."""
SMALL: Final = ("astronaut", "cat", "coffee", "galaxies", "grey", "palette", "1x1", "1x90", "70x1")
HUGE: Final = "8192x8192"


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

    @cached_property
    def content(self) -> bytes:
        """The body as sent."""
        return json.dumps(self.body).encode()

    @cached_property
    def streamed(self) -> bytes:
        """The body of a streamed chat request."""
        more = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({**self.body, **more}).encode()


@cache
def picture(name: str) -> str:
    """Return an image as a ``data:`` URL."""
    if name[0].isdigit():
        width, height = map(int, name.split("x"))
        # Large squares of a photograph: 64 megapixels in a file of less than a megabyte.
        image = photo("astronaut").resize((32, 32)).resize((width, height), Image.Resampling(0))
        return _url(image, "PNG")
    if name == "grey":
        return _url(photo("rocket").convert("L"), "PNG")
    if name == "palette":
        return _url(photo("motorcycle").convert("P"), "GIF")
    return _url(photo(name), {"coffee": "WEBP", "cat": "JPEG"}.get(name, "PNG"))


def _url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{encoded}"


def words(count: int, seed: int) -> str:
    """Return a question of ``count`` words, each one token."""
    known = [word for sentence in SENTENCES for word in sentence.split()]
    return " ".join(random.Random(seed).choices(known, k=count))


def finite_calls(count: int, *, seed: int = 0, huge: bool = True) -> list[Call]:
    """Return the set: every image, budget, selector and length of question in turn, mixed.

    Args:
        count: how many; 60 or more for everything to occur.
        seed: of the mixture.
        huge: images of 64 megapixels are among them.

    """
    chance = random.Random(seed)

    def endless(values: Sequence[Any]) -> Iterator[Any]:
        while True:
            yield from chance.sample(list(values), len(values))

    pictures, budgets = endless(SMALL), endless(BUDGETS)
    lengths, methods = endless(WORDS), endless([NOT_SAID, *BUILT_IN])
    paths = endless([CHAT] * 8 + [RESPONSES, BATCH, TOKENIZE])
    images = endless([0, 1, 1, 1, 1, 1, 1, 2, 2, 3])
    calls = []
    for number in range(count):
        is_huge = huge and number % 40 == 7
        shown = [HUGE] if is_huge else list(itertools.islice(pictures, next(images)))
        question = words(next(lengths), seed=number)
        settings = {"visual_budget": next(budgets), "visual_selector": next(methods)}
        if number % 9 == 4:
            settings["visual_query"] = words(number % 4, seed=number + 1)
        settings = {name: value for name, value in settings.items() if value != NOT_SAID}
        if number % 12 == 5 and isinstance(settings.get("visual_budget"), int | float):
            settings = {"metadata": {name: str(value) for name, value in settings.items()}}
        tokens = chance.choice([1, 4, 8, 8, 16, 16, 48])
        path = next(paths)
        body = _body(path, [picture(each) for each in shown], question, tokens) | settings
        is_pruned = bool(shown) and settings.get("visual_budget") is not None
        name = f"{number} {path} {shown} {settings.get('visual_budget', NOT_SAID)}"
        calls.append(Call(name, path, body, is_huge, is_pruned))
    return calls


def explained(calls: Sequence[Call]) -> list[Call]:
    """Return requests to the explain route for the pruned chat requests."""
    return [
        Call(f"{call.name} explained", EXPLAIN, {**call.body, "logprobs": False, "top_logprobs": 0})
        for call in calls
        if call.path == CHAT and call.is_pruned and not call.is_huge
    ]


def fresh_call(number: int) -> Call:
    """Return a request with a new image; equal numbers give equal requests."""
    chance = random.Random(f"fresh {number}")
    image = Image.frombytes("RGB", (24, 18), chance.randbytes(24 * 18 * 3))
    question = words(chance.choice([1, 4, 12, 40]), seed=-number)
    settings: dict[str, Any] = {"visual_budget": chance.choice([8, 64, 200, 0.25, None])}
    if chance.random() < 0.5:
        settings["visual_selector"] = chance.choice(list(BUILT_IN))
    body = _body(CHAT, [_url(image.resize((240, 180)), "PNG")], question, 8) | settings
    return Call(f"new {number} {settings}", CHAT, body)


def _body(path: str, urls: Sequence[str], question: str, tokens: int) -> dict[str, Any]:
    if path == RESPONSES:
        inputs = [
            *({"type": "input_image", "image_url": url, "detail": "auto"} for url in urls),
            {"type": "input_text", "text": question},
        ]
        return {
            "model": MODEL_NAME,
            "input": [{"role": "user", "content": inputs}],
            "max_output_tokens": tokens,
            "temperature": 0,
        }
    parts: list[dict[str, Any]] = [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": question},
    ]
    conversation = [{"role": "user", "content": parts}]
    if path == TOKENIZE:
        return {"model": MODEL_NAME, "messages": conversation}
    answer = {"model": MODEL_NAME, "max_tokens": tokens, "temperature": 0}
    if path == BATCH:
        other = [{"role": "user", "content": "hello"}]
        return {**answer, "messages": [conversation, other]}
    # The margin of each word distinguishes a near tie from a wrong answer.
    return {**answer, "messages": conversation, "logprobs": True, "top_logprobs": 2}
