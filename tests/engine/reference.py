# SPDX-License-Identifier: Apache-2.0
"""Transformers' model of a checkpoint, to compare answers with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def positions_of(before: int, places: Tensor, whole: int, after: int) -> Tensor:
    """Return positions of text, of the kept tokens out of ``whole``, and of the text after them."""
    behind = torch.arange(before + whole, before + whole + after)
    return torch.cat([torch.arange(before), before + places, behind])


@torch.inference_mode()
def greedy(model: Any, embeddings: Tensor, positions: Tensor, tokens: int) -> list[int]:
    """Return the greedy token ids after embeddings ``(n, D)`` at positions ``(n,)``."""
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
    """Transformers' model and processor: eager attention, float32."""

    def __init__(self, path: Path) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        # For some models vLLM 0.31 replaces Transformers' configuration class by its own.
        registered = type(AutoConfig.from_pretrained(path))
        config = getattr(transformers, registered.__name__, registered).from_pretrained(path)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
