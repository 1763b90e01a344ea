# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2: the projector alone, then the projector and the language model (LLaVA's recipe).

The tower is frozen in both, as in LLaVA-1.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from small_vlm.architecture import normalized, parts_of, tower_of
from small_vlm.scenes import CELL_PATCHES, draw, sample_scene
from small_vlm.train.language import PICTURE, asked_of
from small_vlm.train.packing import answer_loss, encode, pack
from small_vlm.train.schedule import Phase
from small_vlm.train.tower import encode as encode_pictures

FEW: Final = Phase("few objects", share=0.15, cells=2, objects=(1, 4), batch=24)
SOME: Final = Phase("some objects", share=0, cells=3, objects=(2, 6), batch=13)
WHOLE: Final = Phase("whole canvas", share=0.3, cells=4, objects=(2, 9), batch=8)
# On whole canvases alone the model reads an object's row off its place in the prompt, and nothing
# else, since that is enough there. Pictures of several sizes make it look at the features.
ANY_CANVAS: Final = replace(WHOLE, name="any canvas", share=0.55, mixed=(FEW, SOME, WHOLE))


class SightStage:
    """Trains on drawn images; ``modules`` are the trained modules."""

    phases = (FEW, WHOLE, ANY_CANVAS)

    def __init__(self, model: Any, tokenizer: Any, moving: tuple[str, ...]) -> None:
        self.model, self.tokenizer = model, tokenizer
        parts = parts_of(model)
        model.requires_grad_(False)
        self._moving = {name: parts[name] for name in moving}
        for part in self._moving.values():
            part.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        return self._moving

    def step(self, phase: Phase, rng: np.random.Generator) -> dict[str, Tensor]:
        origin = phase.origin(rng)
        scenes = [
            sample_scene(rng, phase.count(rng), phase.cells, origin=origin)
            for _ in range(phase.batch)
        ]
        pixels = normalized([draw(scene) for scene in scenes])
        corner = (origin[0] * CELL_PATCHES, origin[1] * CELL_PATCHES)
        with torch.no_grad():
            features = encode_pictures(tower_of(self.model), pixels, corner)[-2][:, 1:]
        projected = self.model.model.multi_modal_projector(features)
        ids = torch.tensor(encode(self.tokenizer, PICTURE))
        opening = self.model.model.language_model.embed_tokens(ids).expand(len(scenes), -1, -1)
        prefix = torch.cat([opening, projected], dim=1)
        lengths = torch.full((len(scenes),), prefix.shape[1])
        packed = pack(self.tokenizer, [asked_of(scene, rng) for scene in scenes])
        return answer_loss(self.model, prefix, lengths, packed)
