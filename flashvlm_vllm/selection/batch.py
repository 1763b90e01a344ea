# SPDX-License-Identifier: Apache-2.0
"""The selection on padded batches of images, in few kernels and without synchronization."""

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
"""Most bytes of temporary tensors for a batch: 32 images of 576 tokens, 4096 wide. A larger batch
is split; a single image may need more."""
MOST_PADDING: Final = 1.25
"""Largest ratio of the longest to the shortest image of a batch. The number of similarities in
Algorithm 1 grows with the square, so padding adds at most 56 %."""
VECTOR: Final = 16
"""Rows of similarities are padded to a multiple of this length, to be read in whole vectors."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image to select from; the fields are the arguments of `select_visual_tokens`."""

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
    """Select from each item separately, computing many items together.

    The selection of an item does not depend on the other items, except through the rounding of
    matrix products, whose sizes do. There is no synchronization with the device.

    Args:
        items: checked items of any sizes; may be empty.
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
    """Split into batches of equal width, similar length and bounded memory."""
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
    # The image as float32, the compared features twice (gathered, and at unit length), and the
    # similarities.
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
    text = real_words = None
    if any(words):
        real_words = Padding.of(on_device[1], max(words))
        empty = features.new_empty(0, features.shape[-1])
        texts = [empty if item.text_embeds is None else item.text_embeds for item in items]
        text = pad(texts, real_words)
    scores = score(features, saliency, text, config, tokens, real_words)
    ranking = rank(scores.masked_fill(~tokens.valid, -torch.inf))
    if any(keeps):
        compared = features
        if items[0].diversity_features is not None:
            compared = pad([item.compared for item in items], tokens)
        diverse = _diverse(items, ranking, compared, important, keeps, on_device, config)
    else:
        diverse = ranking[:, :1]

    # Positions in the ranking: the important tokens come first, the diverse ones after them.
    budgets = Padding.of(on_device[4], max(item.budget for item in items))
    numbers = torch.arange(budgets.valid.shape[1], device=device)
    best = on_device[2][:, None]
    behind = (numbers - best).clamp(0, diverse.shape[1] - 1)
    places = torch.where(numbers < best, numbers, best + diverse.gather(1, behind))
    chosen = ranking.gather(1, places.clamp_max(ranking.shape[1] - 1))
    # Padding is sorted to the end, so that the first `budget` entries of each row are its tokens.
    beyond = ranking.shape[1]
    ascending = torch.sort(chosen.masked_fill(~budgets.valid, beyond), dim=1).values
    return [row[: item.budget] for row, item in zip(ascending, items, strict=True)]


def _padded_saliency(items: Sequence[Item], tokens: Padding) -> Tensor | None:
    if all(item.saliency is None for item in items):
        return None
    # Eq 1 maps a constant to zeros, the saliency of an image whose attention is unknown.
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
    """Algorithm 1 on the part of the ranking after the important tokens.

    Returns:
        (B, max(keeps)) int64 positions after the important tokens, zeros as padding.
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
    """Return the kernel for all rounds in one launch, or None if triton is not installed."""
    try:
        from flashvlm_vllm.selection.kernels.rounds import remove_near_duplicates_batched
    except ImportError:
        return None
    return remove_near_duplicates_batched
