# SPDX-License-Identifier: Apache-2.0
"""Stage 0a: the vision tower, with an objective like CLIP's on CLS and none on the patches.

Each image is compared with the captions "a red ring", ... of all colours and kinds; a sigmoid per
pair says whether the caption is true (the loss of SigLIP, on CLS as CLIP has it). The pictures
grow in three steps, from a piece of the canvas with one object to the whole: the pieces lie
anywhere on the canvas and use its position embeddings there, so what is learned carries over.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from small_vlm.architecture import VISION_WIDTH, normalized, tower_of
from small_vlm.scenes import CELL_PATCHES, COLORS, KINDS, SIDE, Scene, draw, sample_scene
from small_vlm.train.schedule import Phase

CAPTIONS: Final = [(color, kind) for color in COLORS for kind in KINDS]


class CaptionEncoder(nn.Module):
    """The text side: word vectors of colour and kind, added, through a small MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(COLORS) + len(KINDS), width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        ids = [
            (list(COLORS).index(color), len(COLORS) + KINDS.index(kind)) for color, kind in CAPTIONS
        ]
        self.register_buffer("ids", torch.tensor(ids))
        self.project_image = nn.Linear(VISION_WIDTH, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def forward(self, cls: Tensor) -> Tensor:
        """Return one logit per image and caption, ``(B, 60)``."""
        text = nn.functional.normalize(self.mix(self.words(self.ids).sum(1)), dim=-1)
        image = nn.functional.normalize(self.project_image(cls), dim=-1)
        return image @ text.T * self.scale.exp() + self.bias


def start_positions(tower: Any) -> None:
    """Initialise with sines of row and column, so that neighbours are similar from the start."""
    quarter = VISION_WIDTH // 4
    frequency = 1.0 / 30 ** (torch.arange(quarter) / quarter)
    places = torch.arange(SIDE)[:, None] * frequency
    waves = torch.cat([places.sin(), places.cos()], dim=1)
    rows = waves[:, None].expand(SIDE, SIDE, -1)
    columns = waves[None].expand(SIDE, SIDE, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.zero_()
        tower.embeddings.position_embedding.weight[1:] = 0.5 * grid


def encode(tower: Any, pixels: Tensor, corner: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Run the tower on pieces of the canvas.

    Args:
        tower: CLIP's vision transformer.
        pixels: ``(B, 3, h, w)``, whole patches.
        corner: row and column of the piece's first patch on the canvas.

    Returns:
        the output of every layer, the embeddings first, ``(B, 1 + n, C)`` each.

    """
    parts = tower.embeddings
    patches = parts.patch_embedding(pixels)
    height, width = patches.shape[-2:]
    patches = patches.flatten(2).transpose(1, 2)
    cls = parts.class_embedding.expand(len(pixels), 1, -1)
    rows = torch.arange(height)[:, None] + corner[0]
    columns = torch.arange(width)[None] + corner[1]
    places = torch.cat([torch.zeros(1, dtype=torch.long), (rows * SIDE + columns).flatten() + 1])
    states = torch.cat([cls, patches], dim=1) + parts.position_embedding(places)
    states = tower.pre_layrnorm(states)
    outputs = [states]
    for layer in tower.encoder.layers:
        states = layer(states, attention_mask=None)
        outputs.append(states)
    return outputs


class TowerStage:
    """One training step on freshly drawn pictures."""

    phases = (
        # cells, objects, batch; shares of the stage's time
        Phase("one object", share=0.15, cells=1, objects=(1, 1), batch=128),
        Phase("a few objects", share=0.57, cells=2, objects=(2, 4), batch=32),
        Phase("whole canvas", share=0.28, cells=4, objects=(2, 9), batch=10),
    )

    def __init__(self, model: Any) -> None:
        self.tower = tower_of(model)
        start_positions(self.tower)
        self.captions = CaptionEncoder(VISION_WIDTH)

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower, "captions": self.captions}

    def step(self, phase: Phase, rng: np.random.Generator) -> dict[str, Tensor]:
        scenes = [sample_scene(rng, phase.count(rng), phase.cells) for _ in range(phase.batch)]
        reach = SIDE - phase.cells * CELL_PATCHES
        row, column = (int(part) for part in rng.integers(0, reach + 1, 2))
        pixels = normalized([draw(scene) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            states = encode(self.tower, pixels, (row, column))[-1][:, 0]
        logits = self.captions(self.tower.post_layernorm(states.float()))
        truth = presence(scenes)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        loss = loss.sum(1).mean()
        with torch.no_grad():
            # Of the n best captions, n the number that are true, how many are.
            best = logits.sort(dim=1, descending=True).indices
            ranks = truth.gather(1, best).cumsum(1)
            count = truth.sum(1).long()
            hit = ranks.gather(1, count[:, None] - 1).sum() / count.sum()
        return {"loss": loss, "recall": hit}


def presence(scenes: list[Scene]) -> Tensor:
    """Return which captions are true of which scene, ``(B, 60)`` of 0 and 1."""
    truth = torch.zeros(len(scenes), len(CAPTIONS))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            truth[row, CAPTIONS.index((thing.color, thing.kind))] = 1
    return truth
