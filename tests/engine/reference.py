# SPDX-License-Identifier: Apache-2.0
"""Transformers' own model of a checkpoint, which answers are compared with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def positions_of(before: int, places: Tensor, whole: int, after: int) -> Tensor:
    """Positions of text, of what is kept of ``whole`` tokens, and of text behind it."""
    behind = torch.arange(before + whole, before + whole + after)
    return torch.cat([torch.arange(before), before + places, behind])


@torch.inference_mode()
def greedy(model: Any, embeddings: Tensor, positions: Tensor, tokens: int) -> list[int]:
    """Greedy ids after embeddings ``(n, D)`` that stand at positions ``(n,)``."""
    from transformers import DynamicCache

    assert len(embeddings) == len(positions)
    inputs, at, cache = embeddings[None], positions[None], DynamicCache()
    answer: list[int] = []
    for seen in range(len(embeddings), len(embeddings) + tokens):
        out = model(
            inputs_embeds=inputs,
            position_ids=at,
            attention_mask=torch.ones(1, seen, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        word = out.logits[0, -1].argmax()
        answer.append(int(word))
        inputs, at = model.get_input_embeddings()(word)[None, None], at[:, -1:] + 1
    return answer


class TransformersModel:
    """Model and processor as Transformers has them: eager attention, float32."""

    def __init__(self, path: Path) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        # For some models vLLM 0.31 puts a configuration of its own in the place of Transformers'.
        registered = type(AutoConfig.from_pretrained(path))
        config = getattr(transformers, registered.__name__, registered).from_pretrained(path)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
