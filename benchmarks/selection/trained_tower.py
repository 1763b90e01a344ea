# SPDX-License-Identifier: Apache-2.0
"""Attention of a trained tower on large photographs: the small VLM's, with positions between."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy.reference import Reference
from benchmarks.selection.clock import DEVICE
from benchmarks.selection.selectors import KEPT
from benchmarks.selection.synthetic import grid_of
from flashvlm_vllm.selection import VisualTokens
from small_vlm import WEIGHTS
from small_vlm.architecture import normalized
from small_vlm.scenes import PATCH
from testing.photo import photo

QUESTION: Final = "what color is the circle?"
"""In words of the model's vocabulary; it does not refer to the photograph."""


class Look(NamedTuple):
    """Inputs of one layer's attention, and what a selector is shown but for the saliency."""

    query: Tensor
    """(1, N, H, d)."""
    key: Tensor
    """(1, N, H, d)."""
    tokens: VisualTokens


class TrainedTower:
    """The small VLM's tower and projector, and the layer that its features leave."""

    def __init__(self) -> None:
        self._reference = Reference(WEIGHTS)

    def look(self, name: str, count: int) -> Look:
        """Encode one of `testing.photo`'s photographs as so many patches; CLS is left out."""
        rows, columns = grid_of(count)
        resized = photo(name).resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
        reference = self._reference
        config = reference.model.config
        attention = reference.tower.encoder.layers[config.vision_feature_layer].self_attn
        captured: list[Tensor] = []

        def capture(module: Any, inputs: Any, output: Tensor) -> None:
            heads = output[:, 1:].unflatten(-1, (config.vision_config.num_attention_heads, -1))
            captured.append(heads.to(DEVICE))

        handles = [
            each.register_forward_hook(capture) for each in (attention.q_proj, attention.k_proj)
        ]
        try:
            out = reference.tower(
                normalized([np.asarray(resized)]),
                output_hidden_states=True,
                interpolate_pos_encoding=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        query, key = captured
        features = out.hidden_states[config.vision_feature_layer][0, 1:]
        place = torch.arange(count, device=DEVICE)
        tokens = VisualTokens(
            budget=count // KEPT,
            projected=reference.project(features).to(DEVICE),
            features=features.to(DEVICE),
            saliency=torch.zeros(count, device=DEVICE),
            text=reference.words(QUESTION).to(DEVICE),
            keys=key[0],
            places=torch.stack([place // columns, place % columns], dim=1),
            seed=0,
        )
        return Look(query, key, tokens)
