# SPDX-License-Identifier: Apache-2.0
"""Cache of preprocessed pixels in the API process.

The key of vLLM's own processor cache includes the question about an item, so with another question
the same pixels would be resized and normalized again.
"""

import threading
from collections.abc import Callable, Sequence

from vllm.multimodal.cache.base import MultiModalCache
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems

from flashvlm_vllm.lru import RecentlyUsed


class PixelCache:
    """Outputs of the Hugging Face processor, by item; the least recently used are removed first."""

    def __init__(self, limit_bytes: int) -> None:
        """Store at most ``limit_bytes``; with 0 every item is processed each time."""
        self._held: RecentlyUsed[MultiModalKwargsItem] = RecentlyUsed(
            limit_bytes, MultiModalCache.get_item_size
        )
        self._lock = threading.Lock()

    def of(
        self,
        modality: str,
        names: Sequence[str],
        process: Callable[[int], MultiModalKwargsItem],
    ) -> MultiModalKwargsItems:
        """Return the processed items of a batch; process those that are not cached.

        Args:
            modality: modality of all items.
            names: one per item, equal for equal pixels and processor arguments.
            process: runs the Hugging Face processor on the item with this number alone. In a batch
                it may pad an image to the size of another, which must not be cached.

        """
        known: dict[str, MultiModalKwargsItem] = {}
        for number, name in enumerate(names):
            if name in known:
                continue
            with self._lock:  # vLLM may process several prompts at once, in threads.
                item = self._held.get(name)
            if item is None:
                item = process(number)
                with self._lock:
                    self._held.put(name, item)
            known[name] = item
        return MultiModalKwargsItems({modality: [known[name] for name in names]})
