# SPDX-License-Identifier: Apache-2.0
"""FastV (arXiv 2403.06764, ECCV 2024): after a few layers, only the most attended image tokens.

Written from the description of the method. Deviations and choices of our own:

* **Score.** The paper speaks of the attention that a token gets from all others. The released code
  counts that of the last prompt token alone, and so does this.
* **Count.** Published as a share of the image's tokens. Here it is how many are left behind the
  first layers; `average_tokens` gives the average over all layers that other papers' tables mean.
* The image's tokens compete among themselves only. Published scripts are off by one.
* Tokens that were generated do not change which are left, as with a KV cache.
* Equal attention resolves to the lower index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.inside.llama import Llama, locate
from flashvlm_vllm.selection.arguments import check_count
from flashvlm_vllm.selection.partition import rank


def fastv(
    model: Any,
    inputs_embeds: Tensor,
    visual: slice,
    budget: int,
    layer: int = 2,
    *,
    prompt: int | None = None,
) -> Tensor:
    """Return the logits of the next token, with fewer image tokens from one layer on.

    The image tokens with the most attention from the prompt's last token in layer `layer` - 1,
    mean over the heads, stay; in their order and with the position ids that they had.

    Args:
        model: a `LlavaForConditionalGeneration` on Llama, or a `LlamaForCausalLM`.
        inputs_embeds: (S, D) of prompt and generated tokens, image included.
        visual: where the N image tokens are; text follows them.
        budget: image tokens in the layers from `layer` on, at least 1; N or more changes nothing.
        layer: the first layer without the others, counted from 0; published: 2.
        prompt: how many of the S are the prompt; the rest was generated and stays. None: all.

    Returns:
        (vocabulary,) logits behind the last token, in the dtype of the model.

    Raises:
        TypeError: the budget or the layer is no int, or `inputs_embeds` is not floating point.
        ValueError: the budget is below 1, there is no such layer or none before it, or the image
            is not where `visual` says.
    """
    check_count("budget", budget)
    check_count("layer", layer)
    place = locate(inputs_embeds, visual, prompt)
    llama = Llama(model)
    if layer >= len(llama.layers):
        raise ValueError(f"layer is {layer}; allowed: 1 to {len(llama.layers) - 1}")
    with torch.no_grad():
        hidden = inputs_embeds
        positions = torch.arange(hidden.shape[0], device=hidden.device)
        for index in range(len(llama.layers)):
            output = llama.layer(index, hidden, positions)
            if index == layer - 1:
                last = positions[place.length - 1 : place.length]
                attention = llama.attention(index, hidden, positions, last)[0]
                best = rank(attention[place.start : place.stop])[:budget]
                image = place.start + torch.sort(best).values
                positions = torch.cat([positions[: place.start], image, positions[place.stop :]])
                # Nothing has left before, so positions are places, too.
                output = output.index_select(0, positions)
            hidden = output
        return llama.logits(hidden)


def average_tokens(layers: int, patches: int, budget: int, layer: int = 2) -> float:
    """How many image tokens a layer works on, averaged over all layers.

    Args:
        layers: of the language model.
        patches: image tokens in the first layers.
        budget: image tokens in the others, at least 1; more than `patches` are not there.
        layer: the first of the others, counted from 0, 1 to `layers` - 1.

    Returns:
        The mean, never below `patches` x `layer` / `layers`.

    Raises:
        TypeError: an argument is no int.
        ValueError: one is out of its range.
    """
    for name, value in (("layers", layers), ("patches", patches), ("budget", budget)):
        check_count(name, value)
    check_count("layer", layer)
    if layer >= layers:
        raise ValueError(f"layer is {layer}; allowed: 1 to {layers - 1}")
    return (layer * patches + (layers - layer) * min(budget, patches)) / layers
