# SPDX-License-Identifier: Apache-2.0
"""Which message's words guide the selection of each picture in a conversation."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flashvlm_vllm.request.choices import parse_choice
from flashvlm_vllm.request.question import UserTurn, words_of

VISUAL_STEERING = "visual_steering"
"""Name of the field in requests, flags and processor arguments."""

IMAGE, VIDEO = "image", "video"
_MODALITIES = {
    "image_url": IMAGE,
    "input_image": IMAGE,
    "image_pil": IMAGE,
    "image_embeds": IMAGE,
    "image": IMAGE,
    "video_url": VIDEO,
    "video_embeds": VIDEO,
    "video": VIDEO,
}
"""By the type of a content part, or by its key where it has no type."""


class Steering(StrEnum):
    """Which words guide the selection of a picture that an earlier message brought."""

    MESSAGE = "message"
    """Those of its own message, so that later turns do not change what is kept of it. Pictures of
    the newest message that has any follow the newest user message."""
    LATEST = "latest"
    """Those of the newest user message: every turn selects again for all pictures."""


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
        follows_latest = number == newest or steering is Steering.LATEST
        for modality in turn.modalities:
            words = latest if follows_latest else turn.words or user
            queries.setdefault(modality, []).append(words)
    return {modality: tuple(each) for modality, each in queries.items()}


def turns_of_messages(messages: Iterable[object]) -> list[Turn]:
    """Return the turns of OpenAI style chat messages; see `question.query_from_messages`."""
    return [
        Turn(
            words_of(message.get("content")),
            _modalities(message.get("content")),
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


def _modalities(content: object) -> tuple[str, ...]:
    """Return the modality of each picture in a message, in its order."""
    if isinstance(content, str) or not isinstance(content, Iterable):
        return ()
    found = []
    for part in content:
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type")
        # As in vLLM: by the type, or by the keys of a part without a type or with a uuid.
        kinds = [kind] if isinstance(kind, str) and part.get("uuid") is None else list(part)
        found += [_MODALITIES[each] for each in kinds if each in _MODALITIES][:1]
    return tuple(found)
