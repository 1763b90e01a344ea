# SPDX-License-Identifier: Apache-2.0
"""Trains projector and adapters: ``python -m benchmarks.language_attention.real_parts.train``.

One thread, bfloat16. The stages: one thing in 64 pixels, named; up to three in 128; up to five in
224, hence 196 patches. Without the first stage nothing was named after 20 minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.language_attention.real_parts.model import RealVLM, logits
from benchmarks.language_attention.real_parts.parts import FOLDER
from benchmarks.language_attention.real_parts.scenes import Asked, Pixels, naming, questions, scene

OUTPUT: Final = FOLDER / "trained.pt"
PROJECTOR_RATE: Final = 1.5e-3
ADAPTER_RATE: Final = 8e-4
WARM_UP: Final = 40
"""Steps."""
ABSENT: Final = 0.6
"""Share of the questions with the answer "no" that are asked."""


@dataclass(frozen=True)
class Stage:
    """A part of the training."""

    name: str
    seconds: int
    pictures: int
    """In a step."""
    questions: int
    """At most, for a picture."""


STAGES: Final = (
    Stage("names", 900, 24, 1),
    Stage("small scenes", 1200, 4, 8),
    Stage("scenes", 2600, 3, 10),
)


def draw(stage: Stage, rng: random.Random) -> tuple[Pixels, list[Asked]]:
    """Draw a picture and its questions."""
    if stage.name == "names":
        image, things = scene(rng, 64, 1, 40, 64)
        return image, [naming(things[0])]
    if stage.name == "scenes":
        image, things = scene(rng, 224, rng.randint(2, 5), 40, 100)
        return image, questions(rng, 224, things)
    if rng.random() < 0.4:
        image, things = scene(rng, 128, 1, 60, 122)
        there = [each for each in questions(rng, 128, things) if each.kind == "exist"]
        return image, [naming(things[0]), *there]
    image, things = scene(rng, 128, rng.randint(2, 3), 36, 64)
    return image, questions(rng, 128, things)


def loss_of_picture(model: RealVLM, stage: Stage, rng: random.Random) -> Tensor:
    """Return the loss of one picture with its questions."""
    image, asked = draw(stage, rng)
    asked = [each for each in asked if each.answer != "no" or rng.random() < ABSENT]
    features, _ = model.look([image])
    chosen = [(each.text, each.answer) for each in asked[: stage.questions]]
    found, tokens, _ = logits(model, model.project(features[0].clone()), chosen)
    return functional.cross_entropy(found, tokens)


def standardise(model: RealVLM, rng: random.Random) -> None:
    """Set mean and deviation of the features from 60 pictures."""
    features = torch.cat([model.look([draw(STAGES[-1], rng)[0]])[0][0] for _ in range(60)]).clone()
    model.mean.copy_(features.mean(dim=0))
    model.deviation.copy_(features.std(dim=0) + 1e-3)


def main() -> None:
    """Train, and write what was trained after every stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the stages' seconds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    model = RealVLM(torch.bfloat16)
    standardise(model, rng)
    parameters = [each for each in model.parameters() if each.requires_grad]
    rates = [PROJECTOR_RATE, ADAPTER_RATE]
    of_projector = {id(each) for each in model.projector.parameters()}
    adapters = [each for each in parameters if id(each) not in of_projector]
    optimizer = torch.optim.AdamW(
        [{"params": list(model.projector.parameters())}, {"params": adapters}],
        weight_decay=0.0,
        betas=(0.9, 0.98),
    )
    whole = asked.share * sum(stage.seconds for stage in STAGES)
    begun, steps = time.monotonic(), 0
    for stage in STAGES:
        ends = time.monotonic() + asked.share * stage.seconds
        while time.monotonic() < ends:
            done = min(1.0, (time.monotonic() - begun) / whole)
            falling = 1.0 if done < 0.5 else 0.525 + 0.475 * math.cos(math.pi * (2 * done - 1))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * falling * min(1.0, (steps + 1) / WARM_UP)
            optimizer.zero_grad()
            for _ in range(stage.pictures):
                loss = loss_of_picture(model, stage, rng) / stage.pictures
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            steps += 1
            if steps % 20 == 0:
                print(stage.name, steps, f"{time.monotonic() - begun:.0f} s", flush=True)
        torch.save(model.trained(), OUTPUT)


if __name__ == "__main__":
    main()
