# SPDX-License-Identifier: Apache-2.0
"""VisionZip (arXiv 2412.04467, CVPR 2025): the most attended tokens, and the rest merged into few.

Written from the description of the method. Deviations and choices of our own:

* **Split.** Published pairs of dominant and contextual counts are 162 + 30, 108 + 20 and 54 + 10;
  other budgets follow their ratio 27 : 5, the contextual share rounded to the nearest. Budgets
  below 4 therefore merge nothing.
* **CLS.** In the published method the CLS token is one of the dominant ones, comes first and is
  input of the language model, as here with `cls_feature`. Without it (towers that have none, models
  that expect patches only) every dominant token is a patch.
* A budget for all tokens returns all of them, in order; the published code would only reorder them.
* Patches with a non-finite feature are left out of the merging. A dominant one is returned
  unchanged.
* Equal attention and equal similarity resolve to the lower index.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count, check_tensor
from flashvlm_vllm.selection.baselines.merging import (
    cosines,
    rank_by_attention,
    rows_at_once,
    summable,
)
from flashvlm_vllm.selection.long_lists import MOST_PAIRED

# 54 dominant and 10 contextual tokens of 64, reduced.
CONTEXTUAL_PARTS: Final = 5
ALL_PARTS: Final = 32


def contextual_count(budget: int) -> int:
    """Number of merged tokens: the nearest integer to 5/32 of the budget.

    Args:
        budget: at least 1.

    Returns:
        0 to budget - 1.
    """
    return (2 * CONTEXTUAL_PARTS * budget + ALL_PARTS) // (2 * ALL_PARTS)


def visionzip(
    tower_features: Tensor,
    attention: Tensor,
    keys: Tensor,
    budget: int,
    *,
    cls_feature: Tensor | None = None,
) -> Tensor:
    """Features for the projector instead of those of all patches.

    1. Dominant: the patches with the most attention, in raster order (one fewer with CLS).
    2. Contextual targets: every k-th of the remaining patches, k their number divided by that of
       the targets, rounded down.
    3. Each other remaining patch joins the target whose key is most similar to its own.
    4. Contextual tokens: the target **plus** the mean of the patches that joined it, if any.

    Args:
        tower_features: (N, C) patches from the vision tower's last layer but one, before the
            projector, any float dtype.
        attention: (N,) attention of CLS to the patches in that layer, sum or mean over the heads.
        keys: (N, K) keys of that layer, mean over the heads.
        budget: tokens to return, including CLS, at least 1; the number of tokens or more returns
            all of them unchanged.
        cls_feature: (C,) CLS from the same layer as the patches; None: patches only.

    Returns:
        (min(budget, N), C), or (min(budget, N + 1), C) with CLS: CLS, the dominant tokens in raster
        order, the contextual ones in the order of their targets; dtype and device of
        `tower_features`. Sums are float32.

    Raises:
        TypeError: the budget is not an int or a tensor is not floating point.
        ValueError: the budget is below 1, or shapes or devices do not match.
    """
    check_count("budget", budget)
    check_tensor("tower_features", tower_features, ("N", "C"), like=tower_features)
    count, width = tower_features.shape
    check_tensor("attention", attention, (count,), like=tower_features)
    check_tensor("keys", keys, (count, "K"), like=tower_features)
    if cls_feature is not None:
        check_tensor("cls_feature", cls_feature, (width,), like=tower_features)
    with torch.no_grad():
        parts = [] if cls_feature is None else [cls_feature.to(tower_features.dtype)[None]]
        patches = budget - len(parts)
        if patches >= count:
            return torch.cat([*parts, tower_features])

        contextual = contextual_count(budget)
        dominant = patches - contextual
        ranking = rank_by_attention(attention)
        kept, rest = torch.sort(ranking[:dominant]).values, torch.sort(ranking[dominant:]).values
        parts.append(tower_features.index_select(0, kept))
        if contextual > 0:
            merged = merge_into_targets(
                tower_features.index_select(0, rest), keys.index_select(0, rest), contextual
            )
            parts.append(merged.to(tower_features.dtype))
        return torch.cat(parts)


def visionzip_anchors(attention: Tensor, budget: int) -> Tensor:
    """Return the patch that each token of `visionzip` is, or is merged into.

    Args:
        attention: (N,) as for `visionzip`.
        budget: 1 to N - 1.

    Returns:
        (budget,) int64, distinct, in the order of `visionzip`'s tokens without CLS.
    """
    contextual = contextual_count(budget)
    dominant = budget - contextual
    ranking = rank_by_attention(attention)
    kept, rest = torch.sort(ranking[:dominant]).values, torch.sort(ranking[dominant:]).values
    return torch.cat([kept, rest[context_targets(len(rest), contextual, rest.device)]])


def context_targets(count: int, contextual: int, device: torch.device) -> Tensor:
    """Return the merge targets among the `count` patches that are not dominant."""
    stride = count // max(1, contextual)
    return stride * torch.arange(contextual, device=device)


def merge_into_targets(features: Tensor, keys: Tensor, contextual: int) -> Tensor:
    """Steps 2 to 4: all other patches are merged into evenly spaced targets.

    Args:
        features: (R, C) features of the patches that are not dominant, in raster order.
        keys: (R, K) keys of the same patches.
        contextual: number of targets, 1 to R.

    Returns:
        (contextual, C) float32.
    """
    targets = context_targets(features.shape[0], contextual, features.device)
    features, intact = summable(features)
    target_keys = keys.index_select(0, targets)
    nearest = [
        cosines(some, target_keys).argmax(dim=1) for some in keys.split(rows_at_once(contextual))
    ]
    is_target = torch.zeros_like(intact).index_fill(0, targets, value=True)
    # Patches that join no target are in an additional group after the last.
    joined = torch.where((intact & ~is_target)[:, 0], torch.cat(nearest), contextual)
    total, members = _sums_of_groups(features, joined, contextual)
    return features.index_select(0, targets) + total / members.clamp_min(1.0)[:, None]


def _sums_of_groups(features: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum each group's rows in a fixed order; the order of a scatter add varies on a GPU.

    Args:
        features: (R, C) float32.
        group: (R,) int64, 0 to `groups`; the last one is not summed.
        groups: number of groups.

    Returns:
        (groups, C) sums and (groups,) float32 numbers of rows.
    """
    if len(features) <= MOST_PAIRED:
        joins = (group[:, None] == torch.arange(groups, device=group.device)).float()
        return joins.T @ features, joins.sum(dim=0)
    # A matrix product would take time with the number of groups, which is a share of the rows.
    lengths = torch.zeros(groups + 1, dtype=torch.int64, device=group.device)
    lengths.scatter_add_(0, group, torch.ones_like(group))
    in_groups = features.index_select(0, group.argsort(stable=True))
    sums = torch.segment_reduce(in_groups, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums[:groups], lengths[:groups].float()
