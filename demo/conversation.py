# SPDX-License-Identifier: Apache-2.0
"""A conversation with a new picture in every turn, and the prompt tokens computed for each turn."""

from dataclasses import dataclass
from typing import Any

from demo.measure import DemoError
from demo.world import QUESTIONS, picture_of
from testing.photo import data_url

TURNS = 3
FIRST_SEED = 100
"""Of the pictures: none of those that the demo has shown before."""
REPLY_TOKENS = 4


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    prompt: int
    """All prompt tokens."""
    cached: int
    """Prompt tokens whose KV blocks were in the prefix cache."""

    @property
    def computed(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt - self.cached


def converse(client: Any, model: str, budget: int | None) -> list[Turn]:
    """Have one conversation; each turn shows a picture, asks about it, and repeats what was said.

    Raises:
        DemoError: no turn reports tokens from the prefix cache.

    """
    messages: list[dict[str, Any]] = []
    turns = []
    for number in range(TURNS):
        asked = QUESTIONS[number % len(QUESTIONS)]
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(picture_of(FIRST_SEED + number))}},
            {"type": "text", "text": asked.question},
        ]
        messages.append({"role": "user", "content": parts})
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=REPLY_TOKENS,
            temperature=0,
            extra_body={} if budget is None else {"visual_budget": budget},
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        turns.append(_turn(answer.usage))
    if not any(turn.cached for turn in turns):
        raise DemoError("no turn of the conversation found tokens in the prefix cache")
    return turns


def _turn(usage: Any) -> Turn:
    # vLLM leaves the details out where nothing was cached.
    details = usage.prompt_tokens_details
    return Turn(usage.prompt_tokens, (details and details.cached_tokens) or 0)
