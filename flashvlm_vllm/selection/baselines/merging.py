# SPDX-License-Identifier: Apache-2.0
"""Functions of the two merging baselines: ranking, cosines, sums without non-finite rows."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.config import SelectionConfig
from flashvlm_vllm.selection.partition import rank
from flashvlm_vllm.selection.saliency import intrinsic_saliency
from flashvlm_vllm.selection.scaling import unit_rows

PAIRS_AT_ONCE: Final = 2**23
"""Most cosines computed at a time: 32 MiB of float32, and about as much again for operations on
them."""


def rows_at_once(columns: int) -> int:
    """Return the number of rows of cosines that are computed at a time, given their columns."""
    return max(1, PAIRS_AT_ONCE // max(1, columns))


def rank_by_attention(attention: Tensor) -> Tensor:
    """Token indices by descending attention; non-finite entries last, ties by index.

    Args:
        attention: (N,), any float dtype.

    Returns:
        (N,) int64.
    """
    return rank(intrinsic_saliency(attention, SelectionConfig().epsilon))


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines of every row with every column vector; 0 where one is zero or not finite.

    Args:
        rows: (A, K), any float dtype.
        columns: (B, K), any float dtype.

    Returns:
        (A, B) float32 in [-1, 1] up to rounding.
    """
    return (unit_rows(rows) @ unit_rows(columns).T).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def summable(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features that can be summed: a NaN would affect all tokens through a product.

    Args:
        features: (N, C), any float dtype.

    Returns:
        (N, C) float32 with zeros for rows that have a non-finite entry, and (N, 1) bool: False
        for those rows.
    """
    features = features.float()
    intact = torch.isfinite(features).all(dim=1, keepdim=True)
    return torch.where(intact, features, 0.0), intact
