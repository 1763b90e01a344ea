# SPDX-License-Identifier: Apache-2.0
"""Which message's words guide the selection of each picture in a conversation."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from flashvlm_vllm.request.question import query_from_messages, words_of

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


ALLOWED = " or ".join(repr(str(each)) for each in Steering)


def parse_steering(value: object) -> Steering | None:
    """Check the value of a request field, a flag or a processor argument.

    Args:
        value: ``None`` (the default applies) or one of the two names.

    Raises:
        ValueError: the value is neither; the message names the two.

    """
    if value is None:
        return None
    if isinstance(value, str) and value in tuple(Steering):
        return Steering(value)
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise ValueError(f"visual steering is {ALLOWED}; got {shown}")


def item_queries(messages: Iterable[object], steering: Steering) -> dict[str, tuple[str, ...]]:
    """Return the words that guide the selection of each picture.

    A picture without words in its own message, or in a message of a tool or an assistant without
    words, follows the user message before it.

    Args:
        messages: chat messages, as of `question.query_from_messages`.
        steering: see `Steering`.

    Returns:
        by modality, one entry per image or video in the order of the conversation.

    """
    listed = [each for each in messages if isinstance(each, Mapping)]
    items = [_modalities(message) for message in listed]
    newest = max((number for number, own in enumerate(items) if own), default=-1)
    latest = query_from_messages(listed)
    queries: dict[str, list[str]] = {}
    user = ""
    for number, (message, own) in enumerate(zip(listed, items, strict=True)):
        words = words_of(message.get("content"))
        if message.get("role") == "user" and words:
            user = words
        follows_latest = number == newest or steering is Steering.LATEST
        for modality in own:
            queries.setdefault(modality, []).append(latest if follows_latest else words or user)
    return {modality: tuple(each) for modality, each in queries.items()}


def _modalities(message: Mapping[str, Any]) -> list[str]:
    """Return the modality of each picture in a message, in its order."""
    content = message.get("content")
    if isinstance(content, str) or not isinstance(content, Iterable):
        return []
    found = []
    for part in content:
        if not isinstance(part, Mapping):
            continue
        kinds = [part.get("type"), *part]
        modality = next((_MODALITIES[kind] for kind in kinds if kind in _MODALITIES), None)
        if modality is not None:
            found.append(modality)
    return found
