# SPDX-License-Identifier: Apache-2.0
"""Time of a vision tower like Qwen2.5-VL's, from measured rates.

A tower that makes 32,768 tokens takes about an hour on one core. Its parts are therefore measured
at sizes that take seconds, and put together: what works on each patch by itself grows with the
patches, attention within windows too, attention over the whole image with their square.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.selection.clock import DEVICE, median_ms

WIDTH: Final = 1280
HEADS: Final = 16
MLP: Final = 3420
LAYERS: Final = 32
FULL: Final = 4
"""Layers in which all patches see each other."""
WINDOW: Final = 64
"""Patches that see each other in the other layers."""
PATCHES: Final = 4
"""Of one token."""
MEASURED: Final = 4096
"""Patches of every part measured; a multiple of `WINDOW`."""


@dataclass(frozen=True)
class Rates:
    """Milliseconds of one layer's parts at `MEASURED` patches, float32, random weights."""

    linear_ms: float
    """Everything but attention: norms, projections, the gated MLP."""
    window_ms: float
    full_ms: float

    def full_attention_ms(self, patches: int) -> float:
        """One layer's attention over all patches; computed, as its square."""
        return self.full_ms * (patches / MEASURED) ** 2

    def tower_ms(self, tokens: int) -> float:
        """All layers, for an image of so many tokens; computed."""
        share = PATCHES * tokens / MEASURED
        windows = (LAYERS - FULL) * self.window_ms * share
        full = FULL * self.full_attention_ms(PATCHES * tokens)
        return LAYERS * self.linear_ms * share + windows + full


class Linear(nn.Module):
    """A layer of the tower without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, MLP), nn.Linear(WIDTH, MLP)
        self.down = nn.Linear(MLP, WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        """Return (P, WIDTH) of (P, WIDTH); values stand in for what attention would return."""
        values = self.qkv(self.norms[0](patches))[:, 2 * WIDTH :]
        patches = patches + self.out(values)
        inner = self.norms[1](patches)
        result: Tensor = patches + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return result


@torch.inference_mode()
def measure_rates() -> Rates:
    """Each part of a layer, on the device."""
    patches = torch.randn(MEASURED, WIDTH, device=DEVICE)
    layer = Linear().to(DEVICE)
    return Rates(
        linear_ms=median_ms(partial(layer, patches)),
        window_ms=_attention_ms(MEASURED // WINDOW, WINDOW),
        full_ms=_attention_ms(1, MEASURED),
    )


def _attention_ms(windows: int, patches: int) -> float:
    shape = (3, windows, HEADS, patches, WIDTH // HEADS)
    query, key, value = torch.randn(shape, device=DEVICE)
    return median_ms(partial(F.scaled_dot_product_attention, query, key, value))
