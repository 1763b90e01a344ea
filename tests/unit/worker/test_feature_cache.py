# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers: choices and features within bounds, and failures."""

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


def held(memory: RecentlyUsed[str]) -> list[str]:
    return [key for key in "abcdefgh" if memory.get(key) is not None]


def test_the_least_recently_used_go_first() -> None:
    memory = texts(6)
    for key in "abcdef":
        memory.put(key, "1")
    assert memory.get("a") is not None
    memory.put("g", "1")
    assert held(memory) == ["a", "c", "d", "e", "f", "g"]
    memory.put("h", "55555")
    assert held(memory) == ["g", "h"]
    assert memory.held_bytes == 6


def test_what_is_larger_than_the_bound_is_not_kept_and_costs_nothing_else() -> None:
    memory = texts(3)
    memory.put("a", "1")
    memory.put("b", "55555")
    assert held(memory) == ["a"]
    memory.put("a", "55555")
    assert held(memory) == []
    assert memory.held_bytes == 0


def test_putting_twice_counts_once() -> None:
    memory = texts(4)
    memory.put("a", "1")
    for _ in range(10):
        memory.put("b", "22")
    assert held(memory) == ["a", "b"]
    assert memory.held_bytes == 3


def features(fill: float, with_keys: bool = False) -> ImageFeatures:
    """1,216 bytes, or 1,728 with keys."""
    return ImageFeatures(
        torch.full((1, 16, 8), fill),
        torch.full((1, 16, 10), fill),
        torch.full((1, 16), fill),
        torch.full((1, 16, 2, 4), fill) if with_keys else None,
    )


class Tower:
    """Counts what it is asked to encode."""

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


def test_keys_are_asked_for_anew_when_they_are_missing() -> None:
    tower = Tower(FeatureCache(10_000, CPU))
    tower([b"a"])
    (with_keys,) = tower([b"a"], with_keys=True)
    assert with_keys.keys is not None
    tower([b"a"], with_keys=True)
    tower([b"a"])
    assert tower.encoded == [b"a", b"a"]
    assert tower.cache.read().bytes == features(0, with_keys=True).nbytes


@pytest.mark.parametrize("limit", [0, 1_000])
def test_a_cache_smaller_than_one_image_holds_nothing(limit: int) -> None:
    tower = Tower(FeatureCache(limit, CPU))
    for _ in range(2):
        (answer,) = tower([b"a"])
        assert float(answer.saliency[0, 0]) == ord("a")
    assert tower.encoded == [b"a", b"a"]
    assert tower.cache.read() == CacheStatistics(0, 2, 0)


def test_a_batch_that_does_not_fit_is_answered_all_the_same() -> None:
    tower = Tower(FeatureCache(2 * features(0).nbytes, CPU))
    for _ in range(3):
        answers = tower([b"a", b"b", b"c", b"d"])
        assert [float(each.saliency[0, 0]) for each in answers] == [ord(name) for name in "abcd"]
        assert tower.cache.read().bytes <= 2 * features(0).nbytes


def test_what_is_held_does_not_hold_the_batch_it_came_in() -> None:
    cache = FeatureCache(10_000, CPU)
    batch = torch.zeros(100, 16, 8)

    def encode(missing: list[int]) -> list[ImageFeatures]:
        return [ImageFeatures(batch[:1], batch[:1], batch[:1, :, 0], None)]

    cache.features_of([b"a"], encode, with_keys=False)
    (again,) = cache.features_of([b"a"], encode, with_keys=False)
    assert sum(each.untyped_storage().nbytes() for each in again.tensors) == again.nbytes


def test_what_is_forgotten_is_encoded_again() -> None:
    tower = Tower(FeatureCache(10_000, CPU))
    tower([b"a"])
    tower.cache.clear()
    assert tower.cache.read().bytes == 0
    tower([b"a"])
    assert tower.encoded == [b"a", b"a"]


def test_failures_are_found_by_identity() -> None:
    failures = SelectorFailures()
    failures.add("a", "broke")
    assert failures.among(["b"]) == {}
    assert failures.among(["b", "a"]) == {"a": "broke"}
