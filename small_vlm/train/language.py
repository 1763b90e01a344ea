# SPDX-License-Identifier: Apache-2.0
"""Stage 0b: the language model is trained on scenes described in words.

In LLaVA a language model that can read and answer comes first. Here it reads scenes written down
row by row, as a raster scan would meet them: an object's words come up once or more, among full
stops for the ground.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from small_vlm.checkpoint import PAD
from small_vlm.language import DESCRIBE, description, name_of, place_of, questions
from small_vlm.scenes import Scene, sample_scene
from small_vlm.train.packing import answer_loss, encode, pack
from small_vlm.train.schedule import Phase

QUESTIONS = 8
DESCRIPTIONS = 0.3
PICTURE = "USER: "


def told(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in rows."""
    words: list[str] = []
    for row in range(scene.origin[0], scene.origin[0] + scene.cells):
        things = [thing for thing in scene.things if thing.cell[0] == row]
        if not things:
            continue
        seen: set[int] = set()
        while len(seen) < len(things):
            for index, thing in enumerate(things):
                if rng.random() < 0.7:
                    seen.add(index)
                    parts = [f"{thing.color} {thing.kind}", place_of(thing)]
                    words += parts if rng.random() < 0.5 else reversed(parts)
                words += ["."] * int(rng.integers(1, 3))
    return " ".join(words)


def named(scene: Scene) -> str:
    """Describe a scene as a list, in which an object is easiest to find."""
    return " . ".join(f"{thing.color} {thing.kind}" for thing in scene.things)


def asked_of(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """Choose the branches of one training picture: questions, and sometimes the description.

    At most two questions are about existence, which can only be guessed until the others work.
    """
    asked = questions(scene, rng)
    exist = [question for question in asked if question.family == "exist"][:2]
    asked = [question for question in asked if question.family != "exist"] + exist
    chosen = rng.permutation(len(asked))[:QUESTIONS]
    # Each word of an answer counts alike: the second of "top left" is as much to learn as any.
    branches = [
        (asked[index].text, asked[index].answer, 1.0 + asked[index].answer.count(" "))
        for index in chosen
    ]
    if rng.random() < DESCRIPTIONS:
        branches.append((DESCRIBE, description(scene), 4.0))
    return branches


def looked_up(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """Choose branches that one word of a list answers."""
    asked = [
        question
        for question in questions(scene, rng)
        if question.family in ("color", "shape", "letter")
    ]
    if not asked:
        thing = scene.things[0]
        return [(f"is there a {thing.color} {name_of(thing.kind)} ?", "yes", 1.0)]
    return [(question.text, question.answer, 1.0) for question in asked]


def start_weights(language: Any) -> None:
    """Begin with weights that keep the size of what passes through, whatever the width.

    With the usual 0.02 a model this narrow attends evenly for thousands of steps.
    """
    for name, weight in language.named_parameters():
        if weight.ndim == 2:
            gain = 0.35 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)


class LanguageStage:
    """Trains the language model alone."""

    phases = (
        Phase("two objects", share=0.25, cells=2, objects=(2, 2), batch=32),
        Phase("few objects", share=0.25, cells=2, objects=(1, 4), batch=12),
        Phase("whole canvas", share=0.5, cells=4, objects=(2, 9), batch=8),
    )

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        start_weights(model.model.language_model)

    def modules(self) -> dict[str, nn.Module]:
        return {"language": self.model.model.language_model}

    def step(self, phase: Phase, rng: np.random.Generator) -> dict[str, Tensor]:
        scenes = [
            sample_scene(rng, phase.count(rng), phase.cells, origin=phase.origin(rng))
            for _ in range(phase.batch)
        ]
        if phase is self.phases[0]:
            branches = [looked_up(scene, rng) for scene in scenes]
            pictures = [named(scene) for scene in scenes]
        else:
            branches = [asked_of(scene, rng) for scene in scenes]
            pictures = [told(scene, rng) for scene in scenes]
        texts = [encode(self.tokenizer, PICTURE + picture) for picture in pictures]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
        prefix = self.model.model.language_model.embed_tokens(ids)
        packed = pack(self.tokenizer, branches)
        lengths = torch.tensor([len(text) for text in texts])
        return answer_loss(self.model, prefix, lengths, packed)
