# SPDX-License-Identifier: Apache-2.0
"""The public functions of the FlashVLM selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count
from flashvlm_vllm.selection.batch import Item, select_batched
from flashvlm_vllm.selection.blocks import remove_near_duplicates_in_blocks
from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.partition import partition, partition_by
from flashvlm_vllm.selection.scores import score

PUBLISHED: Final = SelectionConfig()


def select_visual_tokens(
    image_features: Tensor,
    saliency: Tensor | None,
    text_embeds: Tensor | None,
    budget: int,
    diversity_features: Tensor | None = None,
    config: SelectionConfig = PUBLISHED,
) -> Tensor:
    """Indices of the visual tokens to keep for one image (section 3).

    Scores and similarities are float32 for any input dtype. The number of indices is exact for
    every input, including NaN and infinity. Equal scores resolve to the lower index, so all ranks
    and repeated runs on the same hardware give the same result.

    Args:
        image_features: (N, D) projected into the language model's space, N >= 1.
        saliency: (N,) attention received, not normalised; None: uniform.
        text_embeds: (L, D) raw token embeddings of the question; None or L == 0: saliency only.
        budget: tokens to keep, at least 1; N or more keeps all.
        diversity_features: (N, C) compared in Algorithm 1, for LLaVA the features before the
            projector; None: `image_features`.
        config: the constants of the method; by default the published ones.

    Returns:
        (min(budget, N),) int64, ascending, on the device of `image_features`.

    Raises:
        TypeError: the budget is not an int (a bool is refused too) or a tensor is not floating
            point.
        ValueError: the budget is below 1, or shapes or devices do not match.
    """
    (kept,) = select_visual_tokens_ragged(
        [image_features], [saliency], [text_embeds], [budget], [diversity_features], config
    )
    return kept


def select_visual_tokens_ragged(
    image_features: Sequence[Tensor],
    saliency: Sequence[Tensor | None],
    text_embeds: Sequence[Tensor | None],
    budgets: Sequence[int],
    diversity_features: Sequence[Tensor | None] | None = None,
    config: SelectionConfig = PUBLISHED,
) -> list[Tensor]:
    """`select_visual_tokens` for several images of any sizes; each is selected separately.

    On CUDA they are computed together as a padded batch, without synchronization with the device.
    Matrix products of another size may round differently, so an image with nearly equal scores may
    keep other tokens in another batch there.

    Args:
        image_features: one (N_i, D) per image.
        saliency: one (N_i,) or None per image.
        text_embeds: one (L_i, D) or None per image.
        budgets: one per image.
        diversity_features: one (N_i, C) or None per image; None: `image_features` for all.
        config: the same for all images.

    Returns:
        One (min(budget_i, N_i),) int64 tensor per image, ascending.

    Raises:
        TypeError: as for one image; the message names the image.
        ValueError: as for one image, or the sequences differ in length. Every image is checked
            before the first is selected.
    """
    if diversity_features is None:
        diversity_features = [None] * len(image_features)
    lengths = {
        "image_features": len(image_features),
        "saliency": len(saliency),
        "text_embeds": len(text_embeds),
        "budgets": len(budgets),
        "diversity_features": len(diversity_features),
    }
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"every argument needs one entry per image; {given}")

    items = [
        Item(*given)
        for given in zip(
            image_features, saliency, text_embeds, budgets, diversity_features, strict=True
        )
    ]
    for number, item in enumerate(items):
        where = f"image {number}: " if len(items) > 1 else ""
        check_count(f"{where}budget", item.budget)
        _check_tensors(
            where, item.image_features, item.saliency, item.text_embeds, item.diversity_features
        )
    with torch.no_grad():
        # On a GPU, launches dominate, so even a single image is faster this way. On a CPU padding
        # has no benefit, and computing images separately gives the same tokens in any batch.
        if any(item.image_features.is_cuda for item in items):
            return select_batched(items, config)
        return [_select(item, config) for item in items]


def fused_scores(
    image_features: Tensor,
    saliency: Tensor | None,
    text_embeds: Tensor | None,
    config: SelectionConfig = PUBLISHED,
) -> Tensor:
    """The scores that `select_visual_tokens` ranks, for plots and explanations (eq 1 to 7).

    Args:
        image_features: (N, D) projected into the language model's space, any float dtype.
        saliency: (N,) attention received, not normalised; None: uniform.
        text_embeds: (L, D) raw token embeddings of the question; None or L == 0: saliency only.
        config: the constants of the method; by default the published ones.

    Returns:
        (N,) float32, finite, in [0, 1].

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices do not match.
    """
    _check_tensors("", image_features, saliency, text_embeds, None)
    with torch.no_grad():
        return score(image_features, saliency, text_embeds, config)


def _select(item: Item, config: SelectionConfig) -> Tensor:
    if item.budget >= item.count:
        return torch.arange(item.count, device=item.image_features.device)

    def in_blocks(listed: Tensor, keep: int) -> Tensor:
        return remove_near_duplicates_in_blocks(
            listed, keep, config.removed_fraction, config.block_length
        )

    scores = score(item.image_features, item.saliency, item.text_embeds, config)
    share = config.important_fraction
    if config.schedule == "geometric":
        return partition_by(scores, item.compared, item.budget, share, in_blocks)
    return partition(scores, item.compared, item.budget, share, config.removed_per_round)


def _check_tensors(
    where: str,
    image_features: Tensor,
    saliency: Tensor | None,
    text_embeds: Tensor | None,
    diversity_features: Tensor | None,
) -> None:
    """Check that tensors can be scored. Uses shapes and types only, never values."""
    shape = tuple(image_features.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{where}image_features is {shape}; allowed: (N, D) with N, D >= 1")
    count, width = shape
    if saliency is not None and tuple(saliency.shape) != (count,):
        raise ValueError(
            f"{where}saliency is {tuple(saliency.shape)}; allowed: ({count},), one per token"
        )
    if text_embeds is not None and (text_embeds.ndim != 2 or text_embeds.shape[1] != width):
        raise ValueError(
            f"{where}text_embeds is {tuple(text_embeds.shape)}; allowed: (L, {width}), the width "
            "of image_features"
        )
    if diversity_features is not None:
        shape = tuple(diversity_features.shape)
        if len(shape) != 2 or shape[0] != count or shape[1] == 0:
            raise ValueError(
                f"{where}diversity_features is {shape}; allowed: ({count}, C) with C >= 1"
            )

    for name, tensor in (
        ("image_features", image_features),
        ("saliency", saliency),
        ("text_embeds", text_embeds),
        ("diversity_features", diversity_features),
    ):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{where}{name} is {tensor.dtype}; allowed: a floating-point dtype")
        if tensor.device != image_features.device:
            raise ValueError(
                f"{where}{name} is on {tensor.device}; allowed: {image_features.device}, the "
                "device of image_features"
            )
