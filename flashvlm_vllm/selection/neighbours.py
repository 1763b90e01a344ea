# SPDX-License-Identifier: Apache-2.0
"""Averages scores over adjacent visual tokens, because an object covers several of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

REACH: Final = 1
"""Largest distance of neighbours, in rows and in columns."""


def mean_of_near(values: Tensor, places: Tensor, times: int = 1) -> Tensor:
    """Average each value with those at most `REACH` rows and columns away.

    Neighbours are looked up in the sorted places: the size of the grid is not needed, places may be
    missing (padding), and there is no synchronization with the device. O(N log N) time, O(N)
    memory.

    Args:
        values: (N,) float32.
        places: (N, 2) int64, distinct, 0 or more.
        times: how often to average; n times have the width of a Gaussian with a standard deviation
            of sqrt(2 n / 3) tokens.

    """
    rows, columns = places.unbind(dim=1)
    # Large enough that the end of a row is not a neighbour of the start of the next.
    stride = columns.max() + 1 + REACH
    numbers = rows * stride + columns
    ascending, order = torch.sort(numbers)
    near, is_there = [], []
    for down in range(-REACH, REACH + 1):
        for across in range(-REACH, REACH + 1):
            wanted = numbers + down * stride + across
            found = torch.searchsorted(ascending, wanted).clamp_max(len(order) - 1)
            near.append(order[found])
            is_there.append(ascending[found] == wanted)
    indices, weight = torch.stack(near), torch.stack(is_there).to(values.dtype)
    weight = weight / weight.sum(dim=0)
    for _ in range(times):
        values = (values[indices] * weight).sum(dim=0)
    return values


def checkerboard(places: Tensor) -> Tensor:
    """Return the indices of every other visual token, as on a checkerboard.

    Args:
        places: (N, 2) int64 row and column of each token.

    Returns:
        (ceil(N / 2),) int64, ascending. Where places are missing (padding), a few of the wrong
        colour may be among them: the number depends on N only, so that the host need not wait for
        the device.

    """
    is_odd = places.sum(dim=1) % 2
    return is_odd.argsort(stable=True)[: (len(places) + 1) // 2].sort().values


def places_in_time(places: Tensor, times: Tensor | None) -> Tensor:
    """Return places at which tokens of different time steps are no neighbours.

    Args:
        places: (N, 2) int64 row and column of each token in its frame.
        times: (N,) int64 time steps; None for an image.

    """
    if times is None:
        return places
    rows = places[:, 0] + times * (places[:, 0].max() + 1 + REACH)
    return torch.stack([rows, places[:, 1]], dim=1)
