# SPDX-License-Identifier: Apache-2.0
"""Selection of a video as on the server: one token per time step, the rest over the clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from benchmarks.measuring.report import Mark, table
from benchmarks.selection.clock import DEVICE, median_ms, peak_mib
from benchmarks.selection.sizes import WIDTH
from benchmarks.selection.synthetic import frames_of, synthetic_video
from flashvlm_vllm.selection import VisualTokens, run_selector_many
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.worker.video_budget import choose_of_clip

COUNTS: Final = (2048, 4096, 8192, 16384, 32768)
BUDGET: Final = 1024
LARGEST_GROWTH: Final = 2.2
"""Times the memory at twice the tokens; 2 is linear."""


@dataclass(frozen=True)
class Clip:
    """One video of so many tokens in so many time steps, `BUDGET` kept."""

    tokens: int
    frames: int
    ms: float
    peak_mib: float


def measure_clips() -> list[Clip]:
    """`flashvlm` at every size, through the code that the worker runs."""
    return [_measure(count) for count in COUNTS]


def _measure(count: int) -> Clip:
    video = synthetic_video(count, WIDTH, seed=count).to(DEVICE)
    frames, side = frames_of(count)
    place = torch.arange(side * side, device=DEVICE).repeat(frames)
    tokens = VisualTokens(
        budget=BUDGET,
        projected=video.features,
        features=video.features if video.diversity is None else video.diversity,
        saliency=video.saliency,
        text=video.text,
        keys=None,
        places=torch.stack([place // side, place % side], dim=1),
        seed=0,
        times=torch.arange(count, device=DEVICE) // (side * side),
    )
    selector = find_selector("flashvlm")
    choose = partial(run_selector_many, "flashvlm", selector, trusted=True)
    call = partial(choose_of_clip, tokens, frames, selector, choose)
    return Clip(count, frames, median_ms(call), peak_mib(call))


def clips_table(clips: list[Clip]) -> str:
    """Videos as served."""
    return table(
        ["tokens of a video", "time steps", f"time, {BUDGET:,} kept", "memory"],
        [[f"{c.tokens:,}", c.frames, f"{c.ms:.0f} ms", f"{c.peak_mib:.0f} MiB"] for c in clips],
    )


def clips_mark(clips: Sequence[Clip]) -> Mark:
    """Compare the memory of the two largest videos with linear growth."""
    half, whole = clips[-2:]
    growth = whole.peak_mib / half.peak_mib
    return Mark(
        f"video as served: memory at {whole.tokens:,} tokens, times that at {half.tokens:,}: "
        f"<= {LARGEST_GROWTH}",
        f"{growth:.2f}",
        growth <= LARGEST_GROWTH,
    )
