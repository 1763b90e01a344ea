# SPDX-License-Identifier: Apache-2.0
"""The exponent of growth with the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log size: 1 is linear, 2 quadratic.

    Args:
        sizes: above 0, at least two different ones.
        values: one each, above 0.

    Raises:
        ValueError: there are no two sizes, or not one value for each.

    """
    if len(sizes) != len(values):
        raise ValueError(f"{len(values)} values for {len(sizes)} sizes")
    if len(set(sizes)) < 2:
        raise ValueError("a slope needs at least two different sizes")
    logs = torch.tensor([sizes, values], dtype=torch.float64).log()
    across, up = logs - logs.mean(dim=1, keepdim=True)
    return float((across @ up) / (across @ across))
