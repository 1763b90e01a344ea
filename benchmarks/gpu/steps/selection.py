# SPDX-License-Identifier: Apache-2.0
"""Time of the selection on this GPU, and of the methods that it is compared with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch

from benchmarks.gpu import keys
from benchmarks.gpu.recorder import Recorder
from benchmarks.selection.clock import DEVICE, median_ms
from benchmarks.selection.methods import METHODS, select_all
from benchmarks.selection.synthetic import Image, synthetic_image, synthetic_video
from benchmarks.selection.tower import measure_tower

ON_GPU: Final = DEVICE == "cuda"
REPEATS: Final = 50 if ON_GPU else 3
WIDTH: Final = 1024
HOW: Final = (
    "bfloat16, projected features 4096 wide, compared features 1024 wide; launches included"
)
MARKS: Final = {
    keys.SELECTION_ONE: (1, 64),
    keys.SELECTION_32: (32, 64),
    keys.SELECTION_CROPS: (5, 128),
}
"""Images of 576 tokens, and tokens kept of each."""


def batch_of(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Image]:
    """Draw images of 576 tokens."""
    images = [synthetic_image(WIDTH, seed % 8).to(DEVICE) for seed in range(count)]
    return [Image(*(tensor.to(dtype) for tensor in image)) for image in images]


def milliseconds(images: Sequence[Image], budget: int) -> float:
    """Time one call that selects from all images."""
    return round(median_ms(partial(select_all, images, budget), repeats=REPEATS), 3)


def waits() -> None:
    """Select in a mode of torch in which host synchronisation is an error."""
    images = batch_of(5)
    select_all(images, 128)  # kernels are compiled at their first launch
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_all(images, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shares_kept_as_cpu(images: int) -> float:
    """Return which share of the kept tokens a CPU keeps too, from the same float32 features."""
    shares = []
    for seed in range(images):
        image = synthetic_image(WIDTH, seed)
        choose = METHODS["flashvlm"].choose
        cpu, gpu = choose(image, 64), choose(image.to(DEVICE), 64).cpu()
        shares.append(torch.isin(gpu, cpu).float().mean().item())
    return round(sum(shares) / len(shares), 4)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a shallow tower, small batches")
    asked = parser.parse_args()
    recorder = Recorder("selection", HOW)
    for name, (images, budget) in MARKS.items():
        with recorder.part(name):
            count = min(images, 2) if asked.rehearse else images
            recorder.figure(name, milliseconds(batch_of(count), budget), "ms")
    with recorder.part(keys.SELECTION_LIST):
        video = synthetic_video(3072, WIDTH, seed=0).to(DEVICE)
        parts = [tensor.to(torch.bfloat16) for tensor in video]
        one = Image(parts[0][:2880], parts[1][:2880], parts[2], parts[3][:2880])
        recorder.figure(keys.SELECTION_LIST, milliseconds([one], 640), "ms")
    if ON_GPU:
        with recorder.part(keys.NO_SYNC):
            recorder.figure(keys.NO_SYNC, False, conditions="it synchronised, or the check failed")
            waits()
            recorder.check(keys.NO_SYNC, True, "set_sync_debug_mode('error')")
    with recorder.part("published loop and VisPruner"):
        (image,) = batch_of(1, torch.float32)
        for name, method in (
            (keys.PUBLISHED, "published loop"),
            (keys.VISPRUNER, "vispruner"),
        ):
            choose = METHODS[method].choose
            time = median_ms(partial(choose, image, 64), repeats=min(REPEATS, 9))
            recorder.figure(name, round(time, 3), "ms", "float32, the same tensors, batch 1")
        time = median_ms(partial(METHODS["flashvlm"].choose, image, 64), repeats=REPEATS)
        recorder.figure("FlashVLM 576 -> 64, float32", round(time, 3), "ms", "the same tensors")
    with recorder.part("kept as on a CPU"):
        recorder.figure(
            "selection: share of the kept tokens that a CPU keeps",
            shares_kept_as_cpu(2 if asked.rehearse else 8), "", "float32, 576 -> 64",
        )  # fmt: skip
    for images in (1, 2) if asked.rehearse else (1, 32):
        with recorder.part(f"tower, batch {images}"):
            tower = measure_tower(images, layers=2 if asked.rehearse else 24)
            share = tower.percent
            seen = f"tower {tower.tower_ms:.2f} ms, selection {tower.selection_ms:.3f} ms"
            recorder.figure(keys.tower_share(images), round(share, 2), "%", seen)
    return recorder.finish()


if __name__ == "__main__":
    sys.exit(main())
