# SPDX-License-Identifier: Apache-2.0
"""Padded batches of items of different length. Nothing here synchronizes with the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Marks which entries of a padded batch are real: the first `counts[i]` of item `i`."""

    counts: Tensor
    """(B,) int64, each 0 to N."""
    valid: Tensor
    """(B, N) bool."""

    @classmethod
    def of(cls, counts: Tensor, width: int) -> Padding:
        """Return the padding of items with `counts` entries to `width` entries each."""
        return cls(counts, torch.arange(width, device=counts.device) < counts[:, None])


def to_device(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Copy numbers from the host to a device without synchronization.

    Args:
        numbers: rows of equal length.
        device: the target device.

    Returns:
        int64 tensor with the same rows.
    """
    if device.type == "cuda":
        # A copy from pageable memory would wait for all earlier work on the device.
        return torch.tensor(numbers, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(numbers).to(device)


def pad(tensors: Sequence[Tensor], padding: Padding) -> Tensor:
    """Stack tensors of different length, zeros after the shorter ones.

    This is a concatenation and a gather, so the number of kernels does not grow with the number of
    items.

    Args:
        tensors: one (counts[i], ...) per item, on one device, with equal further dimensions.
        padding: padding of these tensors.

    Returns:
        (B, N, ...).
    """
    width = padding.valid.shape[1]
    if all(len(tensor) == width for tensor in tensors):
        return torch.stack(list(tensors))
    rows = torch.cat([*tensors, tensors[0].new_zeros(1, *tensors[0].shape[1:])])
    starts = padding.counts.cumsum(0) - padding.counts
    places = starts[:, None] + torch.arange(width, device=rows.device)
    places = torch.where(padding.valid, places, len(rows) - 1)
    padded: Tensor = rows.index_select(0, places.flatten()).unflatten(0, padding.valid.shape)
    return padded
