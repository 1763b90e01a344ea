# SPDX-License-Identifier: Apache-2.0
"""What the API process remembers of images: their preprocessed pixels.

vLLM's own processor cache is keyed by what is asked about an image too, so another question would
resize and normalise the same pixels again.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from vllm.multimodal.cache.base import MultiModalCache
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems

from flashvlm_vllm.bounded import RecentlyUsed


class PreprocessedImages:
    """Outputs of the Hugging Face processor, by image; the least recently used go first."""

    def __init__(self, limit_bytes: int) -> None:
        """Hold at most ``limit_bytes``; with 0 every image is processed anew."""
        self._held: RecentlyUsed[MultiModalKwargsItem] = RecentlyUsed(
            limit_bytes, MultiModalCache.get_item_size
        )
        self._lock = threading.Lock()

    def of(
        self, images: Sequence[str], process: Callable[[int], MultiModalKwargsItem]
    ) -> dict[str, Any]:
        """Return the model inputs of a batch of images, processing those that are not at hand.

        Args:
            images: one name per image, equal for equal pixels and processor arguments.
            process: runs the Hugging Face processor on the image of this number alone: in a batch
                it may pad an image to the size of another, and such an image is not its own.

        """
        known: dict[str, MultiModalKwargsItem] = {}
        for number, image in enumerate(images):
            if image in known:
                continue
            with self._lock:  # vLLM may process several prompts in as many threads.
                item = self._held.get(image)
            if item is None:
                item = process(number)
                with self._lock:
                    self._held.put(image, item)
            known[image] = item
        items = MultiModalKwargsItems({"image": [known[image] for image in images]})
        return dict(items.get_data())
