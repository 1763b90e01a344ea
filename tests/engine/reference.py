# SPDX-License-Identifier: Apache-2.0
"""Transformers' model of a checkpoint, to compare answers with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvlm_vllm.request.question import user_turn_of
from flashvlm_vllm.selection import LanguageAttention


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


class UserTurnIds:
    """Token ids that a chat template writes around the words of a user's turn."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        turn = user_turn_of(
            lambda messages: tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )
        self.before, self.after = self.ids(turn.prefix), self.ids(turn.suffix)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def around(self, image: str, question: str) -> list[int]:
        """Return a turn with one image and a question."""
        return [*self.before, *self.ids(image), *self.ids(question), *self.after]


@torch.inference_mode()
def language_attention(
    model: Any,
    turn: UserTurnIds,
    rows: Tensor,
    question: list[int],
    left_out: Tensor | None = None,
) -> LanguageAttention:
    """Return the attention in Transformers' second and third decoder layer to an image.

    The image's tokens in the third layer are those after the first.

    Args:
        model: with eager attention.
        turn: what surrounds the question.
        rows: ``(N, D)`` embeddings of the image.
        question: token ids.
        left_out: the image's tokens that the words do not see after the first layer.

    """
    embed, language_model = model.get_input_embeddings(), model.model.language_model
    before, after = (torch.tensor(ids) for ids in (turn.before, [*question, *turn.after]))
    inputs = torch.cat([embed(before), rows, embed(after)])
    visual = slice(len(before), len(before) + len(rows))
    seen: list[Tensor] = []
    values: list[Tensor] = []

    def as_after_first_layer(
        _: Any, arguments: tuple[Tensor, ...], named: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        seen.append(arguments[0])
        mixed = arguments[0].clone()
        mixed[:, visual] = seen[0][:, visual]
        if left_out is not None:
            mask = named["attention_mask"].clone()
            mask[..., left_out + visual.start] = torch.finfo(mask.dtype).min
            named = named | {"attention_mask": mask}
        return (mixed, *arguments[1:]), named

    layers = language_model.layers[1:3]
    hooks = [
        layer.register_forward_pre_hook(as_after_first_layer, with_kwargs=True) for layer in layers
    ]
    hooks += [
        layer.self_attn.v_proj.register_forward_hook(lambda *called: values.append(called[-1][0]))
        for layer in layers
    ]
    out = language_model(inputs_embeds=inputs[None], output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    mean, read = [], []
    for layer, weights, value in zip(layers, out.attentions[1:3], values, strict=True):
        own = weights[0, :, visual.stop :, visual]
        lengths = value[visual].unflatten(-1, (-1, layer.self_attn.head_dim)).norm(dim=-1).T
        lengths = lengths.repeat_interleave(len(own) // len(lengths), dim=0)
        mean.append(own.mean(dim=0))
        ratio = (own / own.mean(dim=1, keepdim=True)).nan_to_num(0.0)
        read.append((own * lengths[:, None] * ratio).mean(dim=0))
    return LanguageAttention(mean[0], torch.stack(read), len(question))
