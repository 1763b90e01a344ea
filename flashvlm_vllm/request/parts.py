# SPDX-License-Identifier: Apache-2.0
"""Images and videos in the content of chat messages, and the settings beside them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flashvlm_vllm.request.budget import BUDGET, Budget, parse_budget
from flashvlm_vllm.request.choices import shown
from flashvlm_vllm.request.field_error import FieldError, parsed
from flashvlm_vllm.request.question import QUERY, parse_query
from flashvlm_vllm.request.selector_name import SELECTOR, parse_selector

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

ITEMS = "flashvlm_items"
"""The processor argument under which ``LLM.chat`` passes the settings of content parts."""

_PARSERS: dict[str, Callable[[object], Any]] = {
    BUDGET: parse_budget,
    QUERY: parse_query,
    SELECTOR: parse_selector,
}
"""Fields that a content part may have."""


@dataclass(frozen=True)
class ItemSettings:
    """Settings of one image or video, from its content part. They precede those of the request."""

    has_budget: bool = False
    """Distinguishes an explicit ``null`` (no pruning of this item) from a missing field."""
    budget: Budget | None = None
    query: str | None = None
    selector: str | None = None


NO_SETTINGS = ItemSettings()


class PromptItems(dict[str, tuple[ItemSettings, ...]]):
    """By modality, the settings of each image or video; empty if no content part has any.

    A type of its own, which a client cannot send as a processor argument.
    """

    @property
    def has_budgets(self) -> bool:
        """Whether an item has a budget of its own other than ``null``."""
        return any(each.budget is not None for own in self.values() for each in own)


def visual_parts(content: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield modality and content part of each image and video of a message, in its order."""
    for part in _parts(content):
        modality = _modality(part)
        if modality is not None:
            yield modality, part


def item_settings(messages: Iterable[object]) -> PromptItems:
    """Return the settings in the content parts of chat messages.

    Args:
        messages: OpenAI style chat messages.

    Raises:
        FieldError: a setting is not valid, or is in a part that is neither image nor video.

    """
    found: dict[str, list[ItemSettings]] = {}
    for message in messages:
        if not isinstance(message, Mapping):
            continue
        for part in _parts(message.get("content")):
            modality = _modality(part)
            if modality is not None:
                own = found.setdefault(modality, [])
                own.append(_settings(part, f"of {modality} {len(own)}"))
            else:
                _refuse_settings(part)
    if all(each is NO_SETTINGS for own in found.values() for each in own):
        return PromptItems()
    return PromptItems({modality: tuple(own) for modality, own in found.items()})


def _parts(content: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, str) or not isinstance(content, Iterable):
        return
    yield from (part for part in content if isinstance(part, Mapping))


def _modality(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    # As in vLLM: by the type, or by the keys of a part without a type or with a uuid.
    kinds = [kind] if isinstance(kind, str) and part.get("uuid") is None else list(part)
    return next((_MODALITIES[each] for each in kinds if each in _MODALITIES), None)


def _settings(part: Mapping[str, Any], which: str) -> ItemSettings:
    if not any(name in part for name in _PARSERS):
        return NO_SETTINGS
    budget, query, selector = (
        parsed(parse, part.get(name), name, which) for name, parse in _PARSERS.items()
    )
    return ItemSettings(BUDGET in part, budget, query, selector)


def _refuse_settings(part: Mapping[str, Any]) -> None:
    for name in _PARSERS:
        if name in part:
            raise FieldError(
                name,
                f"{name} of a content part of type {shown(part.get('type'))}: only parts that are "
                "images or videos have settings",
            )
