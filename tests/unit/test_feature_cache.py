# SPDX-License-Identifier: Apache-2.0
"""How large the cache of image features may be."""

from types import SimpleNamespace

import pytest

from flashvlm_vllm.feature_cache import DEFAULT_GB, feature_cache_bytes, parse_feature_cache_gb


@pytest.mark.parametrize(("value", "size"), [(None, None), (0, 0.0), (0.5, 0.5), (2, 2.0)])
def test_sizes(value: object, size: float | None) -> None:
    assert parse_feature_cache_gb(value) == size


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), "1", True, [1]])
def test_what_is_no_size_is_refused_with_its_name(value: object) -> None:
    with pytest.raises(ValueError, match="visual_feature_cache_gb is a number of GiB"):
        parse_feature_cache_gb(value)


def test_the_default_and_an_explicit_zero() -> None:
    def engine(**settings: float) -> SimpleNamespace:
        return SimpleNamespace(multimodal_config=SimpleNamespace(**settings))

    assert feature_cache_bytes(engine()) == int(DEFAULT_GB * 2**30)
    assert feature_cache_bytes(engine(visual_feature_cache_gb=0.0)) == 0
    assert feature_cache_bytes(engine(visual_feature_cache_gb=1.5)) == 3 * 2**29
