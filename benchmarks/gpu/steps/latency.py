# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-7B's shape at batch 1: first token and GPU memory with 2880, 640 and 160 tokens."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from benchmarks.efficiency.first_token import PROMPT
from benchmarks.efficiency.formulas import CLIP_L, LLAMA_7B
from benchmarks.efficiency.paper import BUDGETS, FULL_TOKENS, ROWS, UNPRUNED
from benchmarks.efficiency.shapes import write_shape
from benchmarks.gpu import keys
from benchmarks.gpu.offline import First, OneAtATime, leave
from benchmarks.gpu.recorder import Recorder, scratch
from benchmarks.measuring.order import alternating
from benchmarks.measuring.pairs import compare
from benchmarks.measuring.pictures import picture
from testing.tiny.llava import build_llava

ON_GPU: Final = torch.cuda.is_available()
SIDE: Final = 672
"""Two by two tiles without padding: 5 x 576 = 2880 patches, and 48 row newlines."""
KV_GIB: Final = 3.5
KV_BYTES_OF_A_TOKEN: Final = LLAMA_7B.kv_bytes([1] * LLAMA_7B.layers, 2)
ROUNDS: Final = 20
SECONDS: Final = 60
LENGTHS: Final = (FULL_TOKENS, *BUDGETS)


def write_model(rehearse: bool) -> Path:
    """Write the 7B's shape without weights, or a tiny model with some."""
    folder = scratch() / "models"
    if rehearse:
        return build_llava(folder / "latency-tiny", next=True)
    return write_shape(
        folder / "llava-next-7b-shape", LLAMA_7B, CLIP_L, head=128, vision_head=64, next=True
    )


def start(rehearse: bool) -> OneAtATime:
    """Start the engine."""
    arguments: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 4096}
    if ON_GPU and not rehearse:
        arguments |= {"dtype": "half", "load_format": "dummy"}
    return OneAtATime(
        write_model(rehearse), 0.5 if rehearse else KV_GIB, on_gpu=ON_GPU, **arguments
    )


def write(recorder: Recorder, rounds: dict[int, list[First]], engine: OneAtATime) -> None:
    """Write the figures of the rounds so far."""
    whole_rows, dtype = rounds[FULL_TOKENS], engine.dtype()
    for tokens, rows in rounds.items():
        how = f"rounds: {len(rows)}, {dtype}, prompt of {rows[0].prompt_tokens} tokens"
        paper = ROWS[UNPRUNED if tokens == FULL_TOKENS else "flashvlm", tokens]
        scheduled = statistics.median(row.scheduled for row in rows)
        shown = f"{how}; the paper {paper.latency_ms:.0f} ms on an A100"
        recorder.figure(
            keys.next_time(tokens, keys.SCHEDULED), round(1000 * scheduled, 2), "ms", shown
        )
        whole = statistics.median(row.whole for row in rows)
        recorder.figure(keys.next_time(tokens, keys.WHOLE), round(1000 * whole, 2), "ms", how)
        if rows[-1].peak_bytes:
            cached = rows[-1].prompt_tokens * KV_BYTES_OF_A_TOKEN
            used = max(row.peak_bytes for row in rows) - engine.kv_cache_bytes() + cached
            recorder.figure(
                keys.next_memory(tokens), round(used / 1e9, 2), "GB",
                f"peak of tensors, with the KV blocks of this request only; the paper "
                f"{paper.memory_gb} GB",
            )  # fmt: skip
        if tokens != FULL_TOKENS:
            ratio = compare([row.scheduled for row in whole_rows], [row.scheduled for row in rows])
            asked = ROWS[UNPRUNED, FULL_TOKENS].latency_ms / paper.latency_ms
            shown = f"{ratio}; {how}; the paper {asked:.2f}"
            name = keys.next_speedup(tokens, keys.SCHEDULED)
            recorder.figure(name, round(ratio.median, 2), "", shown)
            ratio = compare([row.whole for row in whole_rows], [row.whole for row in rows])
            name = keys.next_speedup(tokens, keys.WHOLE)
            recorder.figure(name, round(ratio.median, 2), "", f"{ratio}; {how}")


def main() -> NoReturn:
    """Measure in rounds, each length with a picture of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, two rounds")
    asked = parser.parse_args()
    recorder = Recorder("latency", "random weights")
    engine = start(asked.rehearse)
    rounds: dict[int, list[First]] = {tokens: [] for tokens in LENGTHS}

    def first(tokens: int, number: int) -> First:
        budget = None if tokens == FULL_TOKENS else tokens
        return engine.first(PROMPT, {"image": picture(number, SIDE)}, budget)

    with recorder.part("rounds"):
        for warm in range(3):
            for place, tokens in enumerate(LENGTHS):
                first(tokens, 9000 + 3 * warm + place)
        until = time.monotonic() + SECONDS
        for number in range(2 if asked.rehearse else ROUNDS):
            order = alternating(LENGTHS, number)
            taken = {tokens: first(tokens, 3 * number + at) for at, tokens in enumerate(order)}
            for tokens in LENGTHS:
                rounds[tokens].append(taken[tokens])
            write(recorder, rounds, engine)
            if time.monotonic() > until:
                break
    leave(engine.llm, recorder.finish())


if __name__ == "__main__":
    main()
