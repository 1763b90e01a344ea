# SPDX-License-Identifier: Apache-2.0
"""The two baselines that do not use the image: evenly spaced tokens, and random tokens.

Neither is from a paper. They return indices on the CPU, regardless of torch's default device; the
caller moves them to the device of its features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_vllm.selection.arguments import check_count


def uniform(total: int, budget: int) -> Tensor:
    """The middle token of each of `budget` equal intervals of the raster.

    The raster is treated as one line, row after row; the grid is not used. A budget that divides
    the number of rows therefore selects whole columns (24 of 24 x 24: one token per row, all in the
    same column).

    Args:
        total: tokens of the image, at least 1.
        budget: tokens to keep, at least 1; `total` or more keeps all.

    Returns:
        (min(budget, total),) int64, ascending, on the CPU.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is below 1.
    """
    check_count("total", total)
    check_count("budget", budget)
    kept = min(budget, total)
    return (2 * torch.arange(kept, device="cpu") + 1) * total // (2 * kept)


def random_tokens(total: int, budget: int, seed: int) -> Tensor:
    """Random tokens, the same for the same arguments.

    torch's global random state is neither read nor changed. With the same seed, a larger budget
    keeps all tokens of a smaller one. (torch does not guarantee the same numbers in all releases.)

    Args:
        total: tokens of the image, at least 1.
        budget: tokens to keep, at least 1; `total` or more keeps all.
        seed: 0 to 2^63 - 1.

    Returns:
        (min(budget, total),) int64, distinct, ascending, on the CPU.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.
    """
    check_count("total", total)
    check_count("budget", budget)
    allowed = "an int from 0 to 2^63 - 1"
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; allowed: {allowed}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; allowed: {allowed}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator, device="cpu")
    return torch.sort(shuffled[:budget]).values
