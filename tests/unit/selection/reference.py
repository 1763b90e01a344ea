# SPDX-License-Identifier: Apache-2.0
"""A slow reference implementation of the method: Python floats and lists, one formula at a time.

Written from the paper's equations, independently of the package; only the configuration is
shared. It does not handle NaN and is not optimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashvlm_vllm.selection import SelectionConfig

Vector = Sequence[float]
Matrix = Sequence[Vector]


def dot(left: Vector, right: Vector) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def norm(vector: Vector) -> float:
    return math.sqrt(dot(vector, vector))


def unit(vector: Vector) -> list[float]:
    length = norm(vector)
    return [x / length if length else 0.0 for x in vector]


def scaled_to_unit_range(values: Vector, epsilon: float) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low + epsilon) for value in values]


def softmax(values: Vector) -> list[float]:
    high = max(values)
    powers = [math.exp(value - high) for value in values]
    return [power / math.fsum(powers) for power in powers]


def gated_words(text: Matrix, config: SelectionConfig) -> list[list[float]]:
    if config.query_gate == "none":
        return [unit(word) for word in text]
    if config.query_gate == "normalized_first":
        text = [unit(word) for word in text]
    longest = max(norm(word) for word in text)
    words = []
    for word in text:
        gate = norm(word) / (longest + config.epsilon)
        if config.query_gate == "normalized_last":
            words.append(unit([gate * x for x in word]))
        elif config.query_gate == "normalized_first":
            words.append([gate * x for x in word])
        else:
            words.append([gate * x for x in unit(word)])
    return words


def relevance(image: Matrix, text: Matrix, config: SelectionConfig) -> list[float]:
    words = gated_words(text, config)
    aggregated = []
    for patch in image:
        similarities = [dot(unit(patch), word) for word in words]
        weights = softmax([s / config.aggregation_temperature for s in similarities])
        aggregated.append(math.fsum(w * s for w, s in zip(weights, similarities, strict=True)))
    if not config.sharpening:
        return scaled_to_unit_range(aggregated, config.epsilon)

    probabilities = softmax([a / config.sharpening_temperature for a in aggregated])
    strong = scaled_to_unit_range(
        [p**config.sharpening_power for p in probabilities], config.epsilon
    )
    ascending = sorted(strong)
    position = (1 - config.gate_fraction) * (len(strong) - 1)
    below, above = ascending[math.floor(position)], ascending[math.ceil(position)]
    threshold = below + (position - math.floor(position)) * (above - below)
    gated = [u if u >= threshold else config.attenuation * u for u in strong]
    return scaled_to_unit_range(gated, config.epsilon)


def scores(
    image: Matrix, saliency: Vector | None, text: Matrix | None, config: SelectionConfig
) -> list[float]:
    intrinsic = scaled_to_unit_range(saliency or [0.0] * len(image), config.epsilon)
    if not text:
        return intrinsic
    extrinsic = relevance(image, text, config)
    eta = config.text_weight
    fused = []
    for visual, textual in zip(intrinsic, extrinsic, strict=True):
        if config.fusion == "linear":
            fused.append((1 - eta) * visual + eta * textual)
        else:
            fused.append(
                max(visual, config.epsilon) ** (1 - eta) * max(textual, config.epsilon) ** eta
            )
    return scaled_to_unit_range(fused, config.epsilon)


def algorithm_1_round(features: Matrix, listed: Sequence[int], removed: int) -> list[int]:
    """One round; products are computed again. All compared tokens may be removed."""
    compared, anchors = listed[0::2], listed[1::2]
    largest = {a: max(dot(features[a], features[b]) for b in anchors) for a in compared}
    # sorted() is stable: equal similarities stay in list order.
    by_similarity = sorted(compared, key=lambda a: -largest[a])
    return [*by_similarity[removed:], *anchors]


def algorithm_1(
    features: Matrix, candidates: Sequence[int], keep: int, removed_per_round: int
) -> tuple[list[int], int]:
    """The loop over rounds; return the tokens left and the number of rounds."""
    left = list(candidates)
    rounds = 0
    while len(left) > keep:
        left = algorithm_1_round(features, left, min(removed_per_round, len(left) - keep))
        rounds += 1
    return left, rounds


def select(
    image: Matrix,
    saliency: Vector | None,
    text: Matrix | None,
    budget: int,
    diversity: Matrix | None,
    config: SelectionConfig,
) -> list[int]:
    count = len(image)
    if budget >= count:
        return list(range(count))
    fused = scores(image, saliency, text, config)
    ranking = sorted(range(count), key=lambda i: -fused[i])
    important = int(config.important_fraction * budget)
    kept = ranking[:important]
    if budget > important:
        features = [unit(row) for row in diversity or image]
        residual = ranking[important:]
        kept += algorithm_1(features, residual, budget - important, config.removed_per_round)[0]
    return sorted(kept)
