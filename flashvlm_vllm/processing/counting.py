# SPDX-License-Identifier: Apache-2.0
"""Counts the visual tokens of a prompt's items, once per prompt."""

import threading
from collections.abc import Mapping
from typing import Any

from vllm.multimodal.parse import (
    EmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
    VideoProcessorItems,
    VisionChunkProcessorItems,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from flashvlm_vllm.lru import put_bounded
from flashvlm_vllm.processing.family import FamilyHooks
from flashvlm_vllm.request.budget import TokenCount

_CACHED_UUIDS = 10_000


class TokenCounter:
    """Counts the tokens of items, and caches the counts of items that have a uuid."""

    def __init__(self, family: FamilyHooks) -> None:
        """Use ``family`` to count an item of known size."""
        self._family = family
        self._by_uuid: dict[tuple[str, str], TokenCount] = {}
        self._lock = threading.Lock()

    def counts(
        self, inputs: ProcessorInputs, modality: str, *, needed: bool = True
    ) -> list[TokenCount | None]:
        """Return the token count of each item; ``None`` for an item whose size is not known.

        With ``needed`` false no item is counted, only their number matters.

        A client may send an item once and then refer to it by its uuid alone; vLLM looks it up in
        its cache. The count is cached here, so that such an item gets the same identity again.
        """
        if not needed:
            return [None] * len(inputs.mm_data_items.get(modality) or ())
        counts = self._given(inputs.mm_data_items, modality, inputs.hf_processor_mm_kwargs)
        uuids = (inputs.mm_uuid_items or {}).get(modality) or [None] * len(counts)
        for index, uuid in enumerate(uuids):
            if uuid is None:
                continue
            name = (modality, uuid)
            given = counts[index]
            if given is None:
                counts[index] = self._by_uuid.get(name)
                continue
            # vLLM may process several prompts at once, in threads.
            with self._lock:
                put_bounded(self._by_uuid, name, given, _CACHED_UUIDS)
        return counts

    def _given(
        self, items: MultiModalDataItems, modality: str, arguments: Mapping[str, Any]
    ) -> list[TokenCount | None]:
        given = items.get(modality)
        if isinstance(given, EmbeddingItems):
            sizes = [given.get_feature_size(index) for index in range(len(given))]
            return [TokenCount(size, size) for size in sizes]
        if isinstance(given, (ImageProcessorItems, VideoProcessorItems, VisionChunkProcessorItems)):
            return [
                self._family.count_item(given, index, modality, arguments)
                for index in range(len(given))
            ]
        return []
