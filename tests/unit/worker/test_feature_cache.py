# SPDX-License-Identifier: Apache-2.0
"""The worker's caches: bounded selections and features, and recorded failures."""

import pytest
import torch

pytest.importorskip("vllm")

from flashvlm_vllm.ipc.worker_calls import CacheStatistics
from flashvlm_vllm.lru import RecentlyUsed
from flashvlm_vllm.worker.feature_cache import FeatureCache, ImageFeatures
from flashvlm_vllm.worker.selector_failures import SelectorFailures

CPU = torch.device("cpu")


def texts(limit: int) -> RecentlyUsed[str]:
    return RecentlyUsed(limit, len)


def held(cache: RecentlyUsed[str]) -> list[str]:
    return [key for key in "abcdefgh" if cache.get(key) is not None]


def test_the_least_recently_used_entries_are_evicted_first() -> None:
    cache = texts(6)
    for key in "abcdef":
        cache.put(key, "1")
    assert cache.get("a") is not None
    cache.put("g", "1")
    assert held(cache) == ["a", "c", "d", "e", "f", "g"]
    cache.put("h", "55555")
    assert held(cache) == ["g", "h"]
    assert cache.held_bytes == 6


def test_an_entry_larger_than_the_bound_is_not_kept_and_evicts_nothing_else() -> None:
    cache = texts(3)
    cache.put("a", "1")
    cache.put("b", "55555")
    assert held(cache) == ["a"]
    cache.put("a", "55555")
    assert held(cache) == []
    assert cache.held_bytes == 0


def test_putting_an_entry_twice_counts_once() -> None:
    cache = texts(4)
    cache.put("a", "1")
    for _ in range(10):
        cache.put("b", "22")
    assert held(cache) == ["a", "b"]
    assert cache.held_bytes == 3


def features(fill: float, with_keys: bool = False) -> ImageFeatures:
    """1,216 bytes, or 1,728 with keys."""
    return ImageFeatures(
        torch.full((1, 16, 8), fill),
        torch.full((1, 16, 10), fill),
        torch.full((1, 16), fill),
        torch.full((1, 16, 2, 4), fill) if with_keys else None,
    )


class Tower:
    """Counts the images that it encodes."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.encoded: list[bytes] = []

    def __call__(self, images: list[bytes], *, with_keys: bool = False) -> list[ImageFeatures]:
        def encode(missing: list[int]) -> list[ImageFeatures]:
            self.encoded += [images[number] for number in missing]
            return [features(images[number][0], with_keys) for number in missing]

        return self.cache.features_of(images, encode, with_keys=with_keys)


def test_every_image_is_encoded_once() -> None:
    tower = Tower(FeatureCache(10_000, CPU))
    answers = tower([b"a", b"b", b"a"])
    answers += tower([b"b", b"c"])
    assert tower.encoded == [b"a", b"b", b"c"]
    assert [float(each.saliency[0, 0]) for each in answers] == [ord(name) for name in "ababc"]
    assert tower.cache.read() == CacheStatistics(2, 3, 3 * features(0).nbytes)


def test_an_image_is_encoded_again_if_its_keys_are_missing() -> None:
    tower = Tower(FeatureCache(10_000, CPU))
    tower([b"a"])
    (with_keys,) = tower([b"a"], with_keys=True)
    assert with_keys.keys is not None
    tower([b"a"], with_keys=True)
    tower([b"a"])
    assert tower.encoded == [b"a", b"a"]
    assert tower.cache.read().bytes == features(0, with_keys=True).nbytes


@pytest.mark.parametrize("limit", [0, 1_000])
def test_a_cache_smaller_than_one_image_stays_empty(limit: int) -> None:
    tower = Tower(FeatureCache(limit, CPU))
    for _ in range(2):
        (answer,) = tower([b"a"])
        assert float(answer.saliency[0, 0]) == ord("a")
    assert tower.encoded == [b"a", b"a"]
    assert tower.cache.read() == CacheStatistics(0, 2, 0)


def test_a_batch_larger_than_the_cache_is_still_encoded() -> None:
    tower = Tower(FeatureCache(2 * features(0).nbytes, CPU))
    for _ in range(3):
        answers = tower([b"a", b"b", b"c", b"d"])
        assert [float(each.saliency[0, 0]) for each in answers] == [ord(name) for name in "abcd"]
        assert tower.cache.read().bytes <= 2 * features(0).nbytes


def test_a_cached_entry_does_not_hold_its_whole_batch() -> None:
    cache = FeatureCache(10_000, CPU)
    batch = torch.zeros(100, 16, 8)

    def encode(missing: list[int]) -> list[ImageFeatures]:
        return [ImageFeatures(batch[:1], batch[:1], batch[:1, :, 0], None)]

    cache.features_of([b"a"], encode, with_keys=False)
    (again,) = cache.features_of([b"a"], encode, with_keys=False)
    assert sum(each.untyped_storage().nbytes() for each in again.tensors) == again.nbytes


def test_after_clear_images_are_encoded_again() -> None:
    tower = Tower(FeatureCache(10_000, CPU))
    tower([b"a"])
    tower.cache.clear()
    assert tower.cache.read().bytes == 0
    tower([b"a"])
    assert tower.encoded == [b"a", b"a"]


def test_failures_are_found_by_selection_key() -> None:
    failures = SelectorFailures()
    failures.add("a", "broke")
    assert failures.among(["b"]) == {}
    assert failures.among(["b", "a"]) == {"a": "broke"}
