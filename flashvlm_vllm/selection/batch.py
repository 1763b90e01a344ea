# SPDX-License-Identifier: Apache-2.0
"""Many images in a few kernels: the selection on padded batches, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flashvlm_vllm.selection.blocks import remove_near_duplicates_in_blocks
from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.padding import Padding, pad, to_device
from flashvlm_vllm.selection.partition import (
    cosine_gram,
    important_count,
    rank,
    remove_near_duplicates,
)
from flashvlm_vllm.selection.scores import score

WORKSPACE: Final = 512 * 2**20
"""Bytes of temporary tensors that a batch may need before it is cut in two: 32 images of 576
tokens, 4096 wide. One image alone may need more."""
MOST_PADDING: Final = 1.25
"""How much longer than the shortest the longest image of a batch may be. The similarities of
Algorithm 1 grow with the square, so padding costs at most 56 %."""
VECTOR: Final = 16
"""Rows of similarities of a multiple of this length can be read in whole vectors."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image to select from, as `select_visual_tokens` describes its arguments."""

    image_features: Tensor
    saliency: Tensor | None
    text_embeds: Tensor | None
    budget: int
    diversity_features: Tensor | None

    @property
    def count(self) -> int:
        """N, the number of visual tokens."""
        return self.image_features.shape[0]

    @property
    def compared(self) -> Tensor:
        """The features that Algorithm 1 compares."""
        if self.diversity_features is None:
            return self.image_features
        return self.diversity_features


def select_batched(items: Sequence[Item], config: SelectionConfig) -> list[Tensor]:
    """Select from each item on its own, many at a time.

    What is chosen does not depend on the other items, but for the last bits of matrix products
    whose size does. Nothing is read back from the device and nothing waits for it.

    Args:
        items: checked, of any sizes; without any, no result.
        config: the same for all.

    Returns:
        One (min(budget, N),) int64 tensor per item, ascending. Several may be views of one.
    """
    kept: dict[int, Tensor] = {}
    open_items = []
    for number, item in enumerate(items):
        if item.budget >= item.count:
            kept[number] = torch.arange(item.count, device=item.image_features.device)
        else:
            open_items.append(number)
    for group in _groups(items, open_items):
        chosen = _select_group([items[number] for number in group], config)
        kept |= dict(zip(group, chosen, strict=True))
    return [kept[number] for number in range(len(items))]


def _groups(items: Sequence[Item], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Cut into batches of equal width, similar length and bounded memory."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number in numbers:
        item = items[number]
        is_shared = item.diversity_features is None
        widths = (item.image_features.shape[1], item.compared.shape[1], is_shared)
        alike.setdefault((item.image_features.device, *widths), []).append(number)
    for candidates in alike.values():
        candidates.sort(key=lambda number: items[number].count)
        group: list[int] = []
        for number in candidates:
            longest = items[number].count
            if group and (
                longest > MOST_PADDING * items[group[0]].count
                or (len(group) + 1) * _bytes(items[number]) > WORKSPACE
            ):
                yield group
                group = []
            group.append(number)
        if group:
            yield group


def _bytes(item: Item) -> int:
    # The image as float32, what is compared twice (gathered, and at unit length), similarities.
    widths = item.image_features.shape[1] + 2 * item.compared.shape[1]
    return 4 * item.count * (widths + item.count)


def _select_group(items: Sequence[Item], config: SelectionConfig) -> list[Tensor]:
    device = items[0].image_features.device
    important = [important_count(item.budget, config.important_fraction) for item in items]
    words = [0 if item.text_embeds is None else len(item.text_embeds) for item in items]
    keeps = [item.budget - best for item, best in zip(items, important, strict=True)]
    on_device = to_device(
        [[item.count for item in items], words, important, keeps, [item.budget for item in items]],
        device,
    )
    tokens = Padding.of(on_device[0], max(item.count for item in items))

    features = pad([item.image_features for item in items], tokens)
    saliency = _padded_saliency(items, tokens)
    text = asked = None
    if any(words):
        asked = Padding.of(on_device[1], max(words))
        empty = features.new_empty(0, features.shape[-1])
        texts = [empty if item.text_embeds is None else item.text_embeds for item in items]
        text = pad(texts, asked)
    scores = score(features, saliency, text, config, tokens, asked)
    ranking = rank(scores.masked_fill(~tokens.valid, -torch.inf))
    if any(keeps):
        compared = features
        if items[0].diversity_features is not None:
            compared = pad([item.compared for item in items], tokens)
        diverse = _diverse(items, ranking, compared, important, keeps, on_device, config)
    else:
        diverse = ranking[:, :1]

    # Places in the ranking: the important ones are its first, the diverse ones lie behind them.
    budgets = Padding.of(on_device[4], max(item.budget for item in items))
    numbers = torch.arange(budgets.valid.shape[1], device=device)
    best = on_device[2][:, None]
    behind = (numbers - best).clamp(0, diverse.shape[1] - 1)
    places = torch.where(numbers < best, numbers, best + diverse.gather(1, behind))
    chosen = ranking.gather(1, places.clamp_max(ranking.shape[1] - 1))
    # Padding goes to the end, so that the first `budget` of each row are its tokens.
    beyond = ranking.shape[1]
    ascending = torch.sort(chosen.masked_fill(~budgets.valid, beyond), dim=1).values
    return [row[: item.budget] for row, item in zip(ascending, items, strict=True)]


def _padded_saliency(items: Sequence[Item], tokens: Padding) -> Tensor | None:
    if all(item.saliency is None for item in items):
        return None
    # Of a constant eq 1 makes the zeros of an unknown saliency.
    return pad(
        [
            item.image_features.new_zeros(item.count) if item.saliency is None else item.saliency
            for item in items
        ],
        tokens,
    )


def _diverse(
    items: Sequence[Item],
    ranking: Tensor,
    compared: Tensor,
    important: Sequence[int],
    keeps: Sequence[int],
    on_device: Tensor,
    config: SelectionConfig,
) -> Tensor:
    """Algorithm 1 on what the ranking leaves behind the important tokens.

    Returns:
        (B, max(keeps)) int64 positions behind the important tokens, zeros as padding.
    """
    if config.schedule == "geometric":
        orders = [
            remove_near_duplicates_in_blocks(
                compared[row].index_select(0, ranking[row, best : item.count]),
                keep,
                config.removed_fraction,
                config.block_length,
            )
            for row, (item, best, keep) in enumerate(zip(items, important, keeps, strict=True))
        ]
        return pad_sequence(orders, batch_first=True)

    lengths = [item.count - best for item, best in zip(items, important, strict=True)]
    width = -(-max(lengths) // VECTOR) * VECTOR
    batch, tokens = ranking.shape
    places = on_device[2][:, None] + torch.arange(width, device=ranking.device)
    residual = ranking.gather(1, places.clamp_max(tokens - 1))
    rows = residual + tokens * torch.arange(batch, device=ranking.device)[:, None]
    listed = compared.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
    similarity = cosine_gram(listed)
    rounds = config.removed_per_round
    if similarity.is_cuda and (kernel := _kernel()) is not None:
        lengths_there = on_device[0] - on_device[2]
        return kernel(similarity, lengths_there, on_device[3], max(keeps), rounds)
    return pad_sequence(
        [
            remove_near_duplicates(similarity[row, :length, :length], keep, rounds)
            for row, (length, keep) in enumerate(zip(lengths, keeps, strict=True))
        ],
        batch_first=True,
    )


def _kernel() -> Callable[[Tensor, Tensor, Tensor, int, int], Tensor] | None:
    """Return all rounds in one launch, or None where torch came without triton."""
    try:
        from flashvlm_vllm.selection.kernels.rounds import remove_near_duplicates_batched
    except ImportError:
        return None
    return remove_near_duplicates_batched
