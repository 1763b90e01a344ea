# SPDX-License-Identifier: Apache-2.0
"""Model inputs that tell the worker what to select, with one entry per image or video.

The API process packs them and the worker unpacks them; no other code reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

VISION_CHUNK = "vision_chunk"
"""Modality of images and parts of videos in models that take both as one."""

MODALITIES = ("image", "video", VISION_CHUNK)
"""Modalities whose tokens are selected, by vLLM's names."""

CLOSED = -1
"""Gap of an item whose kept tokens get consecutive positions."""


class TurnIds(NamedTuple):
    """Token ids that the chat template writes around the words of a user's turn."""

    before: tuple[int, ...] = ()
    """From the start of the turn."""
    after: tuple[int, ...] = ()
    """Up to the first generated token."""


NO_TURN = TurnIds()

MOST_WORDS = 512
"""Most tokens that guide the selection, the last ones of a long message: a question usually comes
at the end. Each token adds one score per visual token."""

_KEEP = "kept_tokens"
_QUESTION_IDS = "query_ids"
_SELECTION_KEY = "identity"
_ITEM_KEY = "item"
_SELECTOR = "selector_name"
_GAP = "gap"
_TURN_IDS = "turn_ids"
_TURN_START = "turn_start"
_NAMES = (
    _KEEP,
    _QUESTION_IDS,
    _SELECTION_KEY,
    _ITEM_KEY,
    _SELECTOR,
    _GAP,
    _TURN_IDS,
    _TURN_START,
)


@dataclass(frozen=True)
class ItemRequests:
    """Selection requests of some items. Every list has one entry per item."""

    keep: list[int]
    """Number of tokens to keep."""
    question_ids: list[Tensor]
    """``(L,)`` int64 token ids of the words that guide the selection."""
    selection_keys: list[bytes]
    """Identities of item, budget, selector and question; equal keys get the same selection."""
    item_keys: list[bytes]
    """Identities of the items alone, without budget, selector and question."""
    selectors: list[str]
    gaps: list[int]
    """Positions that the dropped tokens leave unused; `CLOSED` for consecutive positions."""
    turns: list[TurnIds]
    """What surrounds the question; empty unless the selector uses the language model."""
    modality: str = "image"
    """Modality of all items; vLLM never puts items of two modalities into one call."""

    def packed(self) -> dict[str, Any]:
        """Return the requests as model inputs; the first dimension of each is the items."""
        values = {
            _KEEP: torch.tensor(self.keep, dtype=torch.int64),
            _QUESTION_IDS: self.question_ids,  # of different lengths
            _SELECTION_KEY: _as_bytes(self.selection_keys),
            _ITEM_KEY: _as_bytes(self.item_keys),
            # The items of one request may have selectors with names of different lengths.
            _SELECTOR: [_as_bytes([name.encode()])[0] for name in self.selectors],
            _GAP: torch.tensor(self.gaps, dtype=torch.int64),
            _TURN_IDS: [torch.tensor(sum(each, ()), dtype=torch.int64) for each in self.turns],
            _TURN_START: torch.tensor([len(each.before) for each in self.turns]),
        }
        return {field_name(name, self.modality): value for name, value in values.items()}

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> "ItemRequests | None":
        """Remove the requests from model inputs; return ``None`` if nothing is pruned."""
        modality = pruned_modality(kwargs)
        if modality is None:
            return None
        fields = {name: kwargs.pop(field_name(name, modality)) for name in _NAMES}
        return cls(
            torch.stack(list(fields[_KEEP])).flatten().tolist(),
            [ids.flatten() for ids in fields[_QUESTION_IDS]],
            [_bytes_of(key) for key in fields[_SELECTION_KEY]],
            [_bytes_of(key) for key in fields[_ITEM_KEY]],
            [_bytes_of(name).decode() for name in fields[_SELECTOR]],
            torch.stack(list(fields[_GAP])).flatten().tolist(),
            [
                _turn_of(ids, int(start))
                for ids, start in zip(fields[_TURN_IDS], fields[_TURN_START], strict=True)
            ],
            modality,
        )

    def __getitem__(self, batch: slice) -> "ItemRequests":
        """Return the requests of some consecutive items."""
        return ItemRequests(
            self.keep[batch],
            self.question_ids[batch],
            self.selection_keys[batch],
            self.item_keys[batch],
            self.selectors[batch],
            self.gaps[batch],
            self.turns[batch],
            self.modality,
        )


def field_name(name: str, modality: str) -> str:
    """Return the name of a model input. In vLLM each belongs to one modality."""
    return f"visual_{modality}_{name}"


def is_pruned(inputs: Mapping[str, Any], modality: str) -> bool:
    """Return whether the items of a modality among model inputs are pruned."""
    return field_name(_KEEP, modality) in inputs


def pruned_modality(inputs: Mapping[str, Any]) -> str | None:
    """Return the modality of the pruned items among model inputs; ``None`` if nothing is pruned."""
    return next((each for each in MODALITIES if is_pruned(inputs, each)), None)


def field_names(inputs: Mapping[str, Any], modality: str) -> dict[str, bool]:
    """Return this module's names among the model inputs, and whether each stays on the host.

    The counts determine the size of the gather, and reading them from a device would block. Only
    the question's ids are used on the device.
    """
    if not is_pruned(inputs, modality):
        return {}
    return {field_name(name, modality): name != _QUESTION_IDS for name in _NAMES}


def selection_key_of(item: Mapping[str, Any], modality: str) -> str | None:
    """Return a processed item's selection key in hexadecimal; ``None`` if it is not pruned."""
    name = field_name(_SELECTION_KEY, modality)
    return _bytes_of(item[name].data).hex() if name in item else None


def _turn_of(ids: Tensor, start: int) -> TurnIds:
    every = tuple(ids.flatten().tolist())
    return TurnIds(every[:start], every[start:])


def _as_bytes(values: Sequence[bytes]) -> Tensor:
    """Return values of equal length as a ``(n, length)`` uint8 tensor."""
    return torch.tensor([list(value) for value in values], dtype=torch.uint8)


def _bytes_of(value: Tensor) -> bytes:
    return bytes(value.flatten().tolist())
