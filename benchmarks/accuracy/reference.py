# SPDX-License-Identifier: Apache-2.0
"""The small VLM on Hugging Face Transformers: encode once, select in many ways, answer.

What needs no server (sweeps, oracles, methods inside the model) is measured here; what is served
is repeated here in part, and must agree answer by answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.accuracy.layer_attention import attention_of, times_ratio
from flashvlm_vllm.selection import LanguageAttention, Selector, VisualTokens
from flashvlm_vllm.selection.neighbours import checkerboard
from small_vlm.architecture import normalized, tower_of
from small_vlm.checkpoint import EOS
from small_vlm.scenes import SIDE, Pixels

ANSWER_TOKENS = 4
PLACES = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
BEFORE, AFTER = "USER:", "ASSISTANT:"
CHECKERBOARD = checkerboard(PLACES)
"""Every other patch."""


@dataclass(frozen=True)
class Seen:
    """Output of the tower and the projector for one image."""

    features: Tensor
    """(N, C)."""
    projected: Tensor
    """(N, D)."""
    saliency: Tensor
    """(N,)."""
    keys: Tensor
    """(N, H, d)."""

    def tokens(
        self,
        budget: int,
        text: Tensor | None,
        seed: int = 0,
        attention: LanguageAttention | None = None,
    ) -> VisualTokens:
        """Return the input of a selector."""
        return VisualTokens(
            budget,
            self.projected,
            self.features,
            self.saliency,
            text,
            self.keys,
            PLACES,
            seed,
            attention=attention,
        )


class Reference:
    """The model, float32, with batched greedy answers from any visual embeddings."""

    def __init__(self, path: Path) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32
        ).eval()
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
        self.tower = tower_of(self.model)
        self.projector = self.model.model.multi_modal_projector
        self.language = self.model.model.language_model

    @torch.inference_mode()
    def look(self, pictures: Sequence[Pixels]) -> list[Seen]:
        """Encode pictures; saliency and keys are those of the layer the features leave."""
        layer = self.tower.encoder.layers[self.model.config.vision_feature_layer]
        heard: dict[str, Tensor] = {}

        def listen(name: str) -> Any:
            return lambda module, inputs, output: heard.__setitem__(name, output)

        attention = layer.self_attn
        hooks = [
            attention.q_proj.register_forward_hook(listen("q")),
            attention.k_proj.register_forward_hook(listen("k")),
        ]
        try:
            out = self.tower(normalized(list(pictures)), output_hidden_states=True)
        finally:
            for hook in hooks:
                hook.remove()
        features = out.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        heads = self.model.config.vision_config.num_attention_heads
        query = heard["q"].unflatten(-1, (heads, -1))
        key = heard["k"].unflatten(-1, (heads, -1))
        logits = torch.einsum("bhd,bthd->bht", query[:, 0], key) * query.shape[-1] ** -0.5
        saliency = logits.softmax(dim=-1).mean(dim=1)[:, 1:]
        projected = self.projector(features)
        return [
            Seen(*parts) for parts in zip(features, projected, saliency, key[:, 1:], strict=True)
        ]

    def words(self, text: str) -> Tensor:
        """Return the input embeddings of some words, ``(L, D)``."""
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))
        with torch.inference_mode():
            embeddings: Tensor = self.language.embed_tokens(ids)
        return embeddings

    def attention(self, selector: Selector, seen: Seen, text: Tensor) -> LanguageAttention | None:
        """Return what a prompt's words attend to; None for a selector that does not use it.

        Args:
            selector: the selector.
            seen: the picture.
            text: (L, D) embeddings of the question's words.

        """
        if not selector.uses_llm:
            return None
        after = torch.cat([text, self.words(AFTER)])
        passing = CHECKERBOARD if selector.llm_checkerboard else None
        before = self.words(BEFORE)
        layers = attention_of(self.language, before, seen.projected, after, 1, passing)
        read = torch.stack([times_ratio(own.read).mean(dim=0) for own in layers[1:3]])
        return LanguageAttention(layers[1].weights.mean(dim=0), read, len(text))

    def project(self, features: Tensor) -> Tensor:
        """Return merged tower features in the language model's space."""
        with torch.inference_mode():
            projected: Tensor = self.projector(features)
        return projected

    @torch.inference_mode()
    def answer(
        self,
        visual: Sequence[Tensor],
        questions: Sequence[str],
        kept: Sequence[Tensor] | None = None,
        most: int = ANSWER_TOKENS,
    ) -> list[str]:
        """Answer greedily.

        Args:
            visual: (T_i, D) each, in the place of one picture.
            questions: one each.
            kept: (T_i,) each: the tokens' numbers in the whole picture, whose positions they and
                the words then keep. None: positions run on without gaps, as in vLLM.
            most: tokens of an answer.

        """
        head = self.words(BEFORE)
        prompts = [
            torch.cat([head, image, self.words(f"{question} {AFTER}")])
            for image, question in zip(visual, questions, strict=True)
        ]
        positions = [torch.arange(len(prompt)) for prompt in prompts]
        if kept is not None:
            for row, numbers in enumerate(kept):
                tail = len(prompts[row]) - len(head) - len(numbers)
                behind = len(head) + len(PLACES) + torch.arange(tail)
                positions[row] = torch.cat([torch.arange(len(head)), len(head) + numbers, behind])
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        answers = [""] * len(prompts)
        for indices in by_length.values():
            said = self._generate(
                torch.stack([prompts[index] for index in indices]),
                torch.stack([positions[index] for index in indices]),
                most,
            )
            for index, ids in zip(indices, said, strict=True):
                answers[index] = self.tokenizer.decode(ids)
        return answers

    def _generate(self, embeddings: Tensor, positions: Tensor, most: int) -> list[list[int]]:
        said: list[list[int]] = [[] for _ in embeddings]
        open_ = set(range(len(said)))
        cache = None
        for _ in range(most):
            out = self.language(
                inputs_embeds=embeddings,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            best = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(dim=-1)
            for row, token in enumerate(best.tolist()):
                if token == EOS:
                    open_.discard(row)
                elif row in open_:
                    said[row].append(token)
            if not open_:
                break
            embeddings = self.language.embed_tokens(best)[:, None]
            positions = positions[:, -1:] + 1
        return said
