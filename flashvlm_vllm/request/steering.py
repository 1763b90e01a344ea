# SPDX-License-Identifier: Apache-2.0
"""Which message's words guide the selection of each picture in a conversation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flashvlm_vllm.request.choices import parse_choice
from flashvlm_vllm.request.parts import ItemSettings, visual_parts
from flashvlm_vllm.request.question import UserTurn, words_of

VISUAL_STEERING = "visual_steering"
"""Name of the field in requests, flags and processor arguments."""


class Steering(StrEnum):
    """Which words guide the selection of a picture that an earlier message brought."""

    MESSAGE = "message"
    """Those of its own message, so that later turns do not change what is kept of it. Pictures of
    the newest message that has any follow the newest user message."""
    LATEST = "latest"
    """Those of the newest user message: every turn selects again for all pictures."""
    OWN = "own"
    """Those of its own message, for the newest pictures too: no turn selects again."""


@dataclass(frozen=True)
class Turn:
    """Words and pictures of one message."""

    words: str
    modalities: tuple[str, ...]
    """Of its pictures, in their order."""
    is_user: bool = True


def parse_steering(value: object) -> Steering | None:
    """Check a value; errors as of `choices.parse_choice`."""
    return parse_choice(Steering, "visual steering is", value)


def item_queries(
    turns: Sequence[Turn], latest: str, steering: Steering
) -> dict[str, tuple[str, ...]]:
    """Return the words that guide the selection of each picture.

    A picture in a message without words follows the user message before it.

    Args:
        turns: the messages of a conversation.
        latest: the words of the newest user message.
        steering: see `Steering`.

    Returns:
        by modality, one entry per image or video in the order of the conversation.

    """
    newest = max((number for number, turn in enumerate(turns) if turn.modalities), default=-1)
    queries: dict[str, list[str]] = {}
    user = ""
    for number, turn in enumerate(turns):
        if turn.is_user and turn.words:
            user = turn.words
        is_newest = number == newest and steering is Steering.MESSAGE
        follows_latest = is_newest or steering is Steering.LATEST
        for modality in turn.modalities:
            words = latest if follows_latest else turn.words or user
            queries.setdefault(modality, []).append(words)
    return {modality: tuple(each) for modality, each in queries.items()}


def with_own_queries(
    queries: Mapping[str, tuple[str, ...]], items: Mapping[str, Sequence[ItemSettings]]
) -> dict[str, tuple[str, ...]]:
    """Return the words of each picture; those of its content part take precedence.

    Args:
        queries: by modality, the words of each picture.
        items: by modality, the settings of each picture; empty if none has any.

    Returns:
        The words by modality. Settings of another number of pictures are not used.

    """
    return {
        modality: tuple(
            words if own.query is None else own.query
            for words, own in zip(each, items.get(modality, ()), strict=True)
        )
        if len(items.get(modality, ())) == len(each)
        else each
        for modality, each in queries.items()
    }


def turns_of_messages(messages: Iterable[object]) -> list[Turn]:
    """Return the turns of OpenAI style chat messages; see `question.query_from_messages`."""
    return [
        Turn(
            words_of(message.get("content")),
            tuple(modality for modality, _ in visual_parts(message.get("content"))),
            message.get("role") == "user",
        )
        for message in messages
        if isinstance(message, Mapping)
    ]


def turns_of_prompt(prompt: str, turn: UserTurn, placeholders: Mapping[str, str]) -> list[Turn]:
    """Return the user turns of a rendered prompt; none if it does not use the template.

    A picture after a user turn, in the message of a tool, counts to that turn.

    Args:
        prompt: the prompt, with placeholders not yet expanded.
        turn: the template's text around a user's words.
        placeholders: text of one item, by modality.

    """
    turns = []
    for text in turn.split(prompt):
        found = sorted(
            (place.start(), modality)
            for modality, placeholder in placeholders.items()
            for place in re.finditer(re.escape(placeholder), text)
        )
        words = turn.words_of(text)
        for placeholder in placeholders.values():
            words = words.replace(placeholder, " ")
        modalities = tuple(modality for _, modality in found)
        turns.append(Turn(" ".join(words.split()), modalities))
    return turns
