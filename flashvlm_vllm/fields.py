# SPDX-License-Identifier: Apache-2.0
"""What travels to the worker with each image or video of a request that is pruned."""

MODALITIES = ("image", "video")
"""Those whose tokens are selected, by vLLM's names."""

KEPT = "kept_tokens"
QUERY_IDS = "query_ids"
IDENTITY = "identity"
ITEM = "item"
SELECTOR_NAME = "selector_name"
GAP = "gap"
NAMES = (KEPT, QUERY_IDS, IDENTITY, ITEM, SELECTOR_NAME, GAP)
"""How many tokens stay; the words that steer; the item with what is asked of it; the item alone;
the selector; how many positions the dropped tokens keep free (-1: places close up)."""


def field_name(name: str, modality: str) -> str:
    """Return the name of a model input. vLLM ties each to one modality."""
    return f"visual_{modality}_{name}"
