# SPDX-License-Identifier: Apache-2.0
"""Normalisations used by several equations: min-max of scores, unit length of vectors."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from flashvlm_vllm.selection.padding import Padding

# A vector shorter than this is not scaled up to unit length. Not a constant of the paper: it only
# prevents a division by zero.
SHORTEST_NORM: Final = 1e-12


def min_max(values: Tensor, epsilon: float, tokens: Padding | None = None) -> Tensor:
    """Rescale scores to [0, 1]: ``(x - min) / (max - min + epsilon)``, as in eq 1.

    A constant vector becomes zeros. A NaN or an infinity must not affect all other scores through
    the minimum or maximum, so non-finite scores count as the lowest finite one.

    Args:
        values: (..., N) float32 scores, N >= 1; each row is rescaled on its own.
        epsilon: added to the range.
        tokens: which scores are real; None: all. The others become 0.

    Returns:
        (..., N) float32, finite.
    """
    finite = torch.isfinite(values)
    if tokens is not None:
        finite = finite & tokens.valid
    lowest = torch.where(finite, values, torch.inf).amin(dim=-1, keepdim=True)
    values = torch.where(finite, values, lowest)
    highest = values.amax(dim=-1, keepdim=True)
    scaled = (values - lowest) / (highest - lowest + epsilon)
    # Without any finite score this is inf - inf: treat it as a constant vector.
    return scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def unit_rows(vectors: Tensor) -> Tensor:
    """Divide each row by its Euclidean norm; a zero row stays zero.

    Args:
        vectors: (..., M, K), any float dtype.

    Returns:
        (..., M, K) float32. A row with a non-finite entry is non-finite: callers replace the values
        after the product, where there are fewer numbers.
    """
    vectors = vectors.float()
    return vectors / row_norms(vectors)


def row_norms(vectors: Tensor) -> Tensor:
    """Euclidean norm of each row, never zero.

    Args:
        vectors: (..., M, K) float32.

    Returns:
        (..., M, 1) float32, at least `SHORTEST_NORM`.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norms.clamp_min(SHORTEST_NORM)
