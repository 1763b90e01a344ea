# SPDX-License-Identifier: Apache-2.0
"""Settings that an engine is started with."""

from types import SimpleNamespace

import pytest

from flashvlm_vllm.request.visual_positions import VisualPositions
from flashvlm_vllm.settings import (
    DEFAULT_GB,
    ServerSettings,
    parse_feature_cache_gb,
    set_settings,
    settings_of,
)


@pytest.mark.parametrize(("value", "size"), [(None, None), (0, 0.0), (0.5, 0.5), (2, 2.0)])
def test_sizes_are_parsed(value: object, size: float | None) -> None:
    assert parse_feature_cache_gb(value) == size


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), "1", True, [1]])
def test_an_invalid_size_is_refused_with_its_name(value: object) -> None:
    with pytest.raises(ValueError, match="visual_feature_cache_gb is a number of GiB"):
        parse_feature_cache_gb(value)


def test_the_default_size_and_an_explicit_zero() -> None:
    def size(**given: object) -> int:
        return ServerSettings.parse(given).feature_cache_bytes

    assert size() == int(DEFAULT_GB * 2**30)
    assert size(visual_feature_cache_gb=0.0) == 0
    assert size(visual_feature_cache_gb=1.5) == 3 * 2**29


def test_settings_are_stored_on_the_multimodal_config() -> None:
    config = SimpleNamespace(multimodal_config=SimpleNamespace())
    assert settings_of(config) == ServerSettings()
    settings = ServerSettings.parse({"visual_budget": 64, "visual_positions": "closed"})
    set_settings(config, settings)
    assert settings_of(config) is settings
    assert (settings.budget, settings.default_selector) == (64, "flashvlm")
    assert settings.default_positions is VisualPositions.CLOSED
    # A text model has no multimodal config.
    assert settings_of(SimpleNamespace(multimodal_config=None)) == ServerSettings()
