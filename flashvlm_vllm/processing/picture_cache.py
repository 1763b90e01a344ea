# SPDX-License-Identifier: Apache-2.0
"""Cache of images and videos that clients name by a uuid.

A client may send an item once and then name it by its uuid alone. vLLM finds it in its processor
cache, whose key for a pruned item includes budget and question: with another question it would not
be found.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import EmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.ipc.item_fields import MODALITIES
from flashvlm_vllm.lru import RecentlyUsed


class PictureCache:
    """Images and videos by modality and uuid; the least recently used are removed first."""

    def __init__(self, info: Any, limit_bytes: int) -> None:
        """Store at most ``limit_bytes``; with 0 nothing is stored.

        Args:
            info: vLLM's processing info for the model.
            limit_bytes: of the decoded items.

        """
        self._info = info
        self._held: RecentlyUsed[Any] = RecentlyUsed(limit_bytes, _size)
        self._lock = threading.Lock()

    def restored(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """Return inputs with the items that are named by a known uuid alone; store all others."""
        uuids = inputs.mm_uuid_items or {}
        found: dict[str, list[Any]] = {}
        for modality in MODALITIES:
            own = uuids.get(modality) or ()
            if any(each is not None for each in own):
                items = inputs.mm_data_items.get(modality)
                if items is not None and not isinstance(items, EmbeddingItems):
                    # As vLLM hashes them: with the bytes of their files, if it has them.
                    given = [items.get_item_for_hash(number) for number in range(len(items))]
                    if any(self._restore(modality, own, given)):
                        found[modality] = given
        if not found:
            return inputs
        known = self._info.parse_mm_data(found, validate=False)
        return replace(inputs, mm_data_items=MultiModalDataItems({**inputs.mm_data_items, **known}))

    def _restore(self, modality: str, uuids: Sequence[str | None], given: list[Any]) -> list[bool]:
        """Fill in missing items in place; return which were filled in."""
        filled = [False] * len(given)
        for number, (uuid, item) in enumerate(zip(uuids, given, strict=False)):
            if uuid is None:
                continue
            with self._lock:  # vLLM may process several prompts at once, in threads.
                if item is not None:
                    self._held.put((modality, uuid), item)
                else:
                    given[number] = self._held.get((modality, uuid))
                    filled[number] = given[number] is not None
        return filled


def _size(item: Any) -> int:
    """Return the size of an item in bytes, decoded."""
    if isinstance(item, MediaWithBytes):
        return _size(item.media) + len(item.original_bytes)
    if isinstance(item, Image.Image):
        return item.width * item.height * len(item.getbands())
    if isinstance(item, np.ndarray | Tensor):
        return int(item.nbytes)
    if isinstance(item, Mapping):  # A vision chunk, or the metadata of a video.
        return sum(map(_size, item.values()))
    if isinstance(item, Sequence) and not isinstance(item, str):
        return sum(_size(each) for each in item)
    return 0
