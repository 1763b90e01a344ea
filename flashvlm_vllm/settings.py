# SPDX-License-Identifier: Apache-2.0
"""Settings of an engine. Imports neither vLLM nor torch."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashvlm_vllm.request.budget import BUDGET, Budget, parse_budget
from flashvlm_vllm.request.load_levels import LoadLevel, parse_load_levels
from flashvlm_vllm.request.request_budget import RequestBudget, parse_request_budget
from flashvlm_vllm.request.selector_name import DEFAULT_SELECTOR, SELECTOR, parse_selector
from flashvlm_vllm.request.steering import VISUAL_STEERING, Steering, parse_steering
from flashvlm_vllm.request.visual_positions import (
    VISUAL_POSITIONS,
    VisualPositions,
    parse_positions,
)

NAME = "flashvlm"
"""The plugin's name, as in ``--plugins flashvlm``."""

FEATURE_CACHE_GB = "visual_feature_cache_gb"
"""Name of the cache size as a flag and in ``LLM(mm_processor_kwargs=...)``."""

DEFAULT_GB = 0.25
"""Default size of the feature cache in GiB: 40 images of LLaVA-1.5-7B in bfloat16, or 8 of
LLaVA-NeXT."""

BUDGET_MIN, BUDGET_MAX = "visual_budget_min", "visual_budget_max"
UNDER_LOAD = "visual_budget_under_load"

ENGINE_SETTINGS = (
    BUDGET,
    SELECTOR,
    VISUAL_POSITIONS,
    FEATURE_CACHE_GB,
    VISUAL_STEERING,
    BUDGET_MIN,
    BUDGET_MAX,
    UNDER_LOAD,
)
"""Names of the engine's settings, as flags or as processor arguments."""

EXPLAIN_PER_MINUTE = "visual_explain_per_minute"
SERVING_SETTINGS = (EXPLAIN_PER_MINUTE, "visual_playground")
"""Names of the API process's settings, as flags. They are not passed to the engine."""

_ALLOWED_GB = "a number of GiB (0 turns the cache off)"
_ATTRIBUTE = "flashvlm_settings"
"""Attribute of vLLM's ``MultiModalConfig``, which vLLM sends to every process of an engine."""


def is_enabled() -> bool:
    """Return whether ``VLLM_PLUGINS`` names this plugin."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one engine. The defaults apply if a setting is not given at start."""

    budget: RequestBudget | None = None
    """Default budget of requests (``--visual-budget``)."""
    selector: str | None = None
    """Default selector of requests (``--visual-selector``); ``None``: the plugin's default."""
    positions: VisualPositions | None = None
    """Default positions of requests (``--visual-positions``); ``None``: kept."""
    feature_cache_gb: float | None = None
    """Size of each worker's feature cache in GiB (``--visual-feature-cache-gb``)."""
    steering: Steering | None = None
    """Default for requests without one (``--visual-steering``); ``None``: by message."""
    budget_min: Budget | None = None
    """The least that a request can ask for (``--visual-budget-min``)."""
    budget_max: Budget | None = None
    """The most that a request can ask for (``--visual-budget-max``)."""
    under_load: tuple[LoadLevel, ...] = ()
    """Budgets while requests wait (``--visual-budget-under-load``), by ascending number of them."""
    position_axes: int = 0
    """Axes of the model's positions: 1, or 3 with M-RoPE. 0 if the position scheme is not known;
    kept tokens then get consecutive positions. Determined from the model's configuration."""
    no_llm_selectors: str | None = None
    """Why selectors that use the language model are refused; ``None`` if they can be used.
    Determined from the engine's configuration."""
    model_may_fail: bool = False
    """Whether no test has shown that the general adapter works with the model."""

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> "ServerSettings":
        """Check settings given by flags or as processor arguments.

        Args:
            given: values by the names in `ENGINE_SETTINGS`; a missing name means the default.

        Raises:
            ValueError: a value is not valid; the message says what is allowed.

        """
        return cls(
            parse_request_budget(given.get(BUDGET)),
            parse_selector(given.get(SELECTOR)),
            parse_positions(given.get(VISUAL_POSITIONS)),
            parse_feature_cache_gb(given.get(FEATURE_CACHE_GB)),
            parse_steering(given.get(VISUAL_STEERING)),
            *parse_limits(given.get(BUDGET_MIN), given.get(BUDGET_MAX)),
            parse_load_levels(given.get(UNDER_LOAD)),
        )

    @property
    def default_selector(self) -> str:
        """Selector of requests that do not name one."""
        return self.selector or DEFAULT_SELECTOR

    @property
    def default_positions(self) -> VisualPositions:
        """Positions of requests that do not set them."""
        return self.positions or VisualPositions.KEPT

    @property
    def default_steering(self) -> Steering:
        """Steering of requests without one."""
        return self.steering or Steering.MESSAGE

    @property
    def feature_cache_bytes(self) -> int:
        """Size of the feature cache in bytes."""
        size = DEFAULT_GB if self.feature_cache_gb is None else self.feature_cache_gb
        return int(size * 2**30)


def parse_limits(low: object, high: object) -> tuple[Budget | None, Budget | None]:
    """Check the least and the most that requests can ask for; ``None`` means no limit.

    Raises:
        ValueError: a value is not a budget of one item, or the least is more than the most.

    """
    least, most = parse_budget(low), parse_budget(high)
    if type(least) is type(most) and least is not None and most is not None and least > most:
        raise ValueError(f"{BUDGET_MIN} is {least}, which is more than {BUDGET_MAX}, {most}")
    return least, most


def parse_feature_cache_gb(value: object) -> float | None:
    """Check a cache size in GiB given as a Python value; ``None`` means the default.

    Raises:
        ValueError: the value is not a valid size; the message says what is allowed.

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
    """Return an engine's settings, given vLLM's ``MultiModalConfig`` (``None`` for text models)."""
    settings: ServerSettings = getattr(multimodal_config, _ATTRIBUTE, _DEFAULTS)
    return settings


def set_settings(model_config: Any, settings: ServerSettings) -> None:
    """Attach settings to an engine's configuration, which vLLM sends to its workers."""
    setattr(model_config.multimodal_config, _ATTRIBUTE, settings)


_DEFAULTS = ServerSettings()
