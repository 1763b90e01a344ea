# SPDX-License-Identifier: Apache-2.0
"""How large the cache of image features may be. Pure functions."""

import math
from typing import Any

FEATURE_CACHE_GB = "visual_feature_cache_gb"
"""The name under which the flag and ``LLM(mm_processor_kwargs=...)`` give it."""

DEFAULT_GB = 0.25
"""Forty images of LLaVA-1.5-7B in bfloat16, eight of LLaVA-NeXT."""

_ALLOWED = "a number of GiB (0 turns the cache off)"


def parse_feature_cache_gb(value: object) -> float | None:
    """Check a size given as a Python value; ``None`` stands for the default.

    Raises:
        ValueError: it is no size; the message says what is allowed.

    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{FEATURE_CACHE_GB} is {_ALLOWED}; got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{FEATURE_CACHE_GB} is {_ALLOWED}; got {value!r}")
    return float(value)


def feature_cache_bytes(model_config: Any) -> int:
    """Return the size in bytes that an engine was started with, given vLLM's ``ModelConfig``."""
    size = getattr(model_config.multimodal_config, FEATURE_CACHE_GB, None)
    return int((DEFAULT_GB if size is None else size) * 2**30)
