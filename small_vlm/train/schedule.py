# SPDX-License-Identifier: Apache-2.0
"""Runs a stage for a number of seconds of work, with a log, checkpoints and a fixed seed."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from small_vlm.scenes import CELLS


@dataclass(frozen=True)
class Phase:
    """A part of a stage: ``share`` of its time, and what its pictures are like.

    ``mixed`` names phases one of which is drawn for every step, in place of this one.
    """

    name: str
    share: float
    cells: int
    objects: tuple[int, int]
    batch: int
    mixed: tuple[Phase, ...] = ()

    def drawn(self, rng: np.random.Generator) -> Phase:
        """Return what a step's pictures are like."""
        return self.mixed[int(rng.integers(len(self.mixed)))] if self.mixed else self

    def count(self, rng: np.random.Generator) -> int:
        """Draw how many objects a picture has."""
        return int(rng.integers(self.objects[0], self.objects[1] + 1))

    def origin(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw where on the canvas, in cells, a piece lies."""
        row, column = rng.integers(0, CELLS - self.cells + 1, 2)
        return int(row), int(column)


def phase_at(phases: Sequence[Phase], part: float) -> Phase:
    """Return the phase in which ``part`` (0 to 1) of a stage is done."""
    edges = accumulate(phase.share for phase in phases)
    return next(
        (phase for phase, edge in zip(phases, edges, strict=True) if part < edge), phases[-1]
    )


def run_stage(
    name: str, stage: Any, seconds: float, folder: Path, seed: int, peak: float, every: float = 20
) -> None:
    """Train until ``seconds`` of work are done, continuing from the last checkpoint.

    The learning rate warms up over 2 % of the time and falls as a cosine to 2 % of ``peak``. Time
    decides, not a number of steps, so that a slower machine ends as well; the log has both. It is
    the time of one core at work, so other processes do not shorten the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.pt"
    log = (folder / f"{name}.jsonl").open("a", buffering=1)
    modules = stage.modules()
    weights = [
        weight
        for module in modules.values()
        for weight in module.parameters()
        if weight.requires_grad
    ]
    decay = [weight for weight in weights if weight.ndim > 1]
    rest = [weight for weight in weights if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    done, step = 0.0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        optimizer.load_state_dict(saved["optimizer"])
        done, step = saved["seconds"], saved["step"]
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(seed + step)

    def save() -> None:
        state = {
            "modules": {key: module.state_dict() for key, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "seconds": done,
            "step": step,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)

    sums: dict[str, float] = defaultdict(float)
    counted, told, saved_at = 0, done, done
    while done < seconds:
        started = time.thread_time()
        part = done / seconds
        warm = min(1.0, part / 0.02 + 1e-3)
        rate = peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        phase = phase_at(stage.phases, part)
        result = stage.step(phase.drawn(rng), rng)
        optimizer.zero_grad(set_to_none=True)
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        for key, value in result.items():
            sums[key] += float(value.detach())
        counted += 1
        done += time.thread_time() - started
        if done - told >= every or done >= seconds:
            means = {key: round(value / counted, 4) for key, value in sums.items()}
            line = {
                "stage": name,
                "phase": phase.name,
                "seconds": round(done),
                "step": step,
                "rate": round(rate, 6),
                **means,
            }
            log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            sums.clear()
            counted, told = 0, done
        if done - saved_at >= 120:
            saved_at = done
            save()
    save()
