# SPDX-License-Identifier: Apache-2.0
"""A video of 32 frames on LLaVA-OneVision-7B's shape: whole, and a fifth of its tokens."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu import keys
from benchmarks.gpu.offline import First, OneAtATime, leave
from benchmarks.gpu.onevision import SIDE, VIDEO, write_onevision
from benchmarks.gpu.recorder import Recorder, scratch
from benchmarks.measuring.pairs import compare
from benchmarks.measuring.pictures import picture

ON_GPU: Final = torch.cuda.is_available()
FRAMES: Final = 32
SHARE: Final = 0.2
PROMPT: Final = f"USER: {VIDEO}\nWhat is in this picture? ASSISTANT:"
KV_GIB: Final = 3.0
ROUNDS: Final = 10
SECONDS: Final = 50


def clip(number: int, frames: int) -> NDArray[np.uint8]:
    """Move over a photograph: ``(frames, SIDE, SIDE, 3)``."""
    wide = np.asarray(picture(number, SIDE + 4 * frames))
    return np.stack([wide[4 * i : 4 * i + SIDE, 4 * i : 4 * i + SIDE] for i in range(frames)])


def write(recorder: Recorder, rounds: dict[str, list[First]], frames: int) -> None:
    """Write the figures of the rounds so far."""
    for name, rows in rounds.items():
        how = f"rounds: {len(rows)}, {frames} frames, prompt of {rows[0].prompt_tokens} tokens"
        scheduled = statistics.median(row.scheduled for row in rows)
        recorder.figure(
            keys.video_time(name, keys.SCHEDULED),
            round(1000 * scheduled, 2), "ms", how,
        )  # fmt: skip
        whole = statistics.median(row.whole for row in rows)
        recorder.figure(keys.video_time(name, keys.WHOLE), round(1000 * whole, 2), "ms", how)
    ratio = compare(
        [row.scheduled for row in rounds["whole"]], [row.scheduled for row in rounds["a fifth"]]
    )
    recorder.figure(
        "OneVision-7B, video: whole over a fifth, scheduled to first token",
        round(ratio.median, 2), "", str(ratio),
    )  # fmt: skip


def main() -> NoReturn:
    """Measure in rounds, each with clips of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, four frames")
    asked = parser.parse_args()
    recorder = Recorder("video", "random weights")
    frames = 4 if asked.rehearse else FRAMES
    model = scratch() / "models" / ("onevision-tiny" if asked.rehearse else "onevision-7b-shape")
    arguments: dict[str, Any] = {
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "limit_mm_per_prompt": {"image": 0, "video": 1},
    }
    if ON_GPU and not asked.rehearse:
        arguments |= {"dtype": "half", "load_format": "dummy"}
    engine = OneAtATime(
        write_onevision(model, tiny=asked.rehearse),
        0.5 if asked.rehearse else KV_GIB,
        on_gpu=ON_GPU,
        **arguments,
    )
    rounds: dict[str, list[First]] = {"whole": [], "a fifth": []}
    budgets = {"whole": None, "a fifth": SHARE}

    def first(name: str, number: int) -> First:
        return engine.first(PROMPT, {"video": clip(number, frames)}, budgets[name])

    with recorder.part("rounds"):
        for warm in range(2):
            for place, name in enumerate(rounds):
                first(name, 9000 + 2 * warm + place)
        until = time.monotonic() + SECONDS
        for number in range(2 if asked.rehearse else ROUNDS):
            for place, (name, rows) in enumerate(rounds.items()):
                rows.append(first(name, 2 * number + place))
            write(recorder, rounds, frames)
            if time.monotonic() > until:
                break
    leave(engine.llm, recorder.finish())


if __name__ == "__main__":
    main()
