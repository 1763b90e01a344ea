# SPDX-License-Identifier: Apache-2.0
"""A minimal Triton kernel, to check that one compiles and launches; imported only on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _double(  # type: ignore[no-untyped-def]
    source, target, count, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, at < count) * 2, at < count)


def doubled(x: Tensor) -> Tensor:
    """Return ``2 * x`` of a vector."""
    found = torch.full_like(x, torch.nan)
    _double[(triton.cdiv(len(x), 256),)](x, found, len(x), BLOCK=256)
    return found
