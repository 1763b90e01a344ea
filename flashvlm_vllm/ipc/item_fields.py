# SPDX-License-Identifier: Apache-2.0
"""Model inputs that carry a request's selection to the worker, an entry per image or video.

The API process packs them, the worker unpacks them; nothing else reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("image", "video")
"""Those whose tokens are selected, by vLLM's names."""

CLOSED = -1
"""The gap of an item whose positions close up."""

_KEEP = "kept_tokens"
_QUESTION_IDS = "query_ids"
_SELECTION_KEY = "identity"
_ITEM_KEY = "item"
_SELECTOR = "selector_name"
_GAP = "gap"
_NAMES = (_KEEP, _QUESTION_IDS, _SELECTION_KEY, _ITEM_KEY, _SELECTOR, _GAP)


@dataclass(frozen=True)
class ItemRequests:
    """What is asked of some items; every list has an entry per item."""

    keep: list[int]
    """Tokens that stay."""
    question_ids: list[Tensor]
    """``(L,)`` int64 token ids of the words that guide the selection."""
    selection_keys: list[bytes]
    """Equal for what must get the same answer: the item, its budget, selector and question."""
    item_keys: list[bytes]
    """Equal for equal items, whatever is asked of them."""
    selectors: list[str]
    gaps: list[int]
    """Positions that the dropped tokens keep free; `CLOSED` where positions close up."""
    modality: str = "image"
    """Of all of them: vLLM never puts items of two modalities into one call."""

    def packed(self) -> dict[str, Tensor]:
        """Return the requests as model inputs, each with the items as its first dimension."""
        values = {
            _KEEP: torch.tensor(self.keep, dtype=torch.int64),
            _QUESTION_IDS: torch.stack(self.question_ids),
            _SELECTION_KEY: _as_bytes(self.selection_keys),
            _ITEM_KEY: _as_bytes(self.item_keys),
            _SELECTOR: _as_bytes([name.encode() for name in self.selectors]),
            _GAP: torch.tensor(self.gaps, dtype=torch.int64),
        }
        return {field_name(name, self.modality): value for name, value in values.items()}

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> "ItemRequests | None":
        """Remove the requests from model inputs; return ``None`` when nothing is pruned."""
        for modality in MODALITIES:
            if field_name(_KEEP, modality) in kwargs:
                fields = {name: kwargs.pop(field_name(name, modality)) for name in _NAMES}
                break
        else:
            return None
        return cls(
            torch.stack(list(fields[_KEEP])).flatten().tolist(),
            [ids.flatten() for ids in fields[_QUESTION_IDS]],
            [_bytes_of(key) for key in fields[_SELECTION_KEY]],
            [_bytes_of(key) for key in fields[_ITEM_KEY]],
            [_bytes_of(name).decode() for name in fields[_SELECTOR]],
            torch.stack(list(fields[_GAP])).flatten().tolist(),
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
            self.modality,
        )


def field_name(name: str, modality: str) -> str:
    """Return the name of a model input. vLLM ties each to one modality."""
    return f"visual_{modality}_{name}"


def is_pruned(inputs: Mapping[str, Any], modality: str) -> bool:
    """Return whether the items of a modality among model inputs are pruned."""
    return field_name(_KEEP, modality) in inputs


def field_names(inputs: Mapping[str, Any], modality: str) -> dict[str, bool]:
    """Return which of the model inputs are this module's, and which stay on the host.

    The counts size the gather, and reading them from a device would wait. Only the question's ids
    are looked up on the device.
    """
    if not is_pruned(inputs, modality):
        return {}
    return {field_name(name, modality): name != _QUESTION_IDS for name in _NAMES}


def selection_key_of(item: Mapping[str, Any], modality: str) -> str | None:
    """Return a processed item's selection key, hex; ``None`` of an item that is not pruned."""
    name = field_name(_SELECTION_KEY, modality)
    return _bytes_of(item[name].data).hex() if name in item else None


def _as_bytes(values: Sequence[bytes]) -> Tensor:
    """Return ``(n, length)`` uint8 of values of equal length."""
    return torch.tensor([list(value) for value in values], dtype=torch.uint8)


def _bytes_of(value: Tensor) -> bytes:
    return bytes(value.flatten().tolist())
