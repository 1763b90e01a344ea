# SPDX-License-Identifier: Apache-2.0
"""What an engine is started with. Imports neither vLLM nor torch."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashvlm_vllm.request.budget import BUDGET, Budget, parse_budget
from flashvlm_vllm.request.selector_name import DEFAULT_SELECTOR, SELECTOR, parse_selector
from flashvlm_vllm.request.visual_positions import (
    VISUAL_POSITIONS,
    VisualPositions,
    parse_positions,
)

NAME = "flashvlm"
"""The plugin's name, as in ``--plugins flashvlm``."""

FEATURE_CACHE_GB = "visual_feature_cache_gb"
"""The name under which the flag and ``LLM(mm_processor_kwargs=...)`` give it."""

DEFAULT_GB = 0.25
"""Forty images of LLaVA-1.5-7B in bfloat16, eight of LLaVA-NeXT."""

ENGINE_SETTINGS = (BUDGET, SELECTOR, VISUAL_POSITIONS, FEATURE_CACHE_GB)
"""Settings of an engine, as flags or as processor arguments."""

EXPLAIN_PER_MINUTE = "visual_explain_per_minute"
SERVING_SETTINGS = (EXPLAIN_PER_MINUTE, "visual_playground")
"""Settings of an API process, as flags; the engine does not know them."""

_ALLOWED_GB = "a number of GiB (0 turns the cache off)"
_ATTRIBUTE = "flashvlm_settings"
"""Of vLLM's multimodal config, which reaches every process of an engine."""


def is_enabled() -> bool:
    """Return whether ``VLLM_PLUGINS`` names this plugin."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one engine. The defaults hold where nothing is said at start."""

    budget: Budget | None = None
    """For requests that do not have one (``--visual-budget``)."""
    selector: str | None = None
    """Likewise (``--visual-selector``); ``None``: the plugin's default."""
    positions: VisualPositions | None = None
    """Likewise (``--visual-positions``); ``None``: kept."""
    feature_cache_gb: float | None = None
    """Size of each worker's feature cache in GiB (``--visual-feature-cache-gb``)."""
    position_axes: int = 0
    """Axes of the positions that kept tokens keep: 1, or 3 with M-RoPE; 0 where the model's
    position scheme is not known and positions close up. Follows from the model."""

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> "ServerSettings":
        """Check settings given by flags or as processor arguments.

        Args:
            given: values by the names in `ENGINE_SETTINGS`; those left out keep their defaults.

        Raises:
            ValueError: a value is not valid; the message says what is allowed.

        """
        return cls(
            parse_budget(given.get(BUDGET)),
            parse_selector(given.get(SELECTOR)),
            parse_positions(given.get(VISUAL_POSITIONS)),
            parse_feature_cache_gb(given.get(FEATURE_CACHE_GB)),
        )

    @property
    def default_selector(self) -> str:
        """The selector of requests that do not name one."""
        return self.selector or DEFAULT_SELECTOR

    @property
    def default_positions(self) -> VisualPositions:
        """The positions of requests that do not say."""
        return self.positions or VisualPositions.KEPT

    @property
    def feature_cache_bytes(self) -> int:
        """Size of the feature cache in bytes."""
        size = DEFAULT_GB if self.feature_cache_gb is None else self.feature_cache_gb
        return int(size * 2**30)


def parse_feature_cache_gb(value: object) -> float | None:
    """Check a cache size given as a Python value; ``None`` stands for the default.

    Raises:
        ValueError: the value is not a size; the message says what is allowed.

    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{FEATURE_CACHE_GB} is {_ALLOWED_GB}; got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{FEATURE_CACHE_GB} is {_ALLOWED_GB}; got {value!r}")
    return float(value)


def settings_of(model_config: Any) -> ServerSettings:
    """Return an engine's settings, given vLLM's ``ModelConfig`` in any of its processes."""
    return settings_on(model_config.multimodal_config)


def settings_on(multimodal_config: Any) -> ServerSettings:
    """Return an engine's settings, given vLLM's ``MultiModalConfig`` (``None`` of a text model)."""
    settings: ServerSettings = getattr(multimodal_config, _ATTRIBUTE, _DEFAULTS)
    return settings


def set_settings(model_config: Any, settings: ServerSettings) -> None:
    """Attach settings to an engine's configuration, which vLLM sends to its workers."""
    setattr(model_config.multimodal_config, _ATTRIBUTE, settings)


_DEFAULTS = ServerSettings()
