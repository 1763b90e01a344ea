# SPDX-License-Identifier: Apache-2.0
"""ToMe (arXiv 2210.09461, ICLR 2023): similar tokens merge in every layer of the vision tower.

Written from the description of the method. Deviations and choices of our own:

* **Layers.** LLaVA reads a layer before the tower's last one. Only the layers up to there merge,
  because no later merge could reach the language model.
* **Schedule.** The same number of merges in every layer, one more in the first ones where it does
  not divide. A layer can merge half of its tokens at most. Where the even number is more than
  that, the other layers share the rest evenly. Published, such a layer merges what it can and the
  result has more tokens than planned.
* **Order.** ToMe leaves its tokens in a scrambled order. A language model that was trained on
  patches in raster order should not get them so: they are sorted by the first patch in each.
* A layer with nothing to merge keeps its order too.
* One picture is worked on at a time, so the result does not hang on the rest of a batch.
* Equal similarity resolves to the token that comes first in the layer's order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flashvlm_vllm.selection.arguments import check_count
from flashvlm_vllm.selection.baselines.merging import cosines
from flashvlm_vllm.selection.partition import rank


class Tokens(NamedTuple):
    """The tokens of one picture inside the tower, CLS at place 0.

    Attributes:
        features: (T, C), dtype of the tower.
        sizes: (T,) float32, how many of CLS and the patches each one holds.
        first: (T,) int64, the lowest of their indices: 0 is CLS, 1 the first patch.
    """

    features: Tensor
    sizes: Tensor
    first: Tensor


def merge_schedule(patches: int, budget: int, layers: int) -> list[int]:
    """How many tokens each layer merges into others.

    As even as possible: no schedule has a smaller maximum. A layer merges at most half of the
    patch tokens that reach it, rounded down.

    Args:
        patches: patch tokens (CLS not counted) that enter the first layer, at least 1.
        budget: patch tokens that leave the last one, 1 to `patches`.
        layers: at least 1.

    Returns:
        One number per layer, in their order; the sum is `patches` - `budget`.

    Raises:
        TypeError: an argument is no int.
        ValueError: one is out of its range, or halving in every layer leaves more than `budget`.
    """
    for name, value in (("patches", patches), ("budget", budget), ("layers", layers)):
        check_count(name, value)
    if budget > patches:
        raise ValueError(f"budget is {budget}; allowed: 1 to {patches}, the number of patches")
    left = patches
    # With each step one layer may merge one more, so that one token fewer is left or, where
    # halving is what limits, none. No number of tokens is skipped.
    for steps in range(patches - budget, layers * (patches // 2) + 1):
        each, extra = divmod(steps, layers)
        merges: list[int] = []
        left = patches
        for layer in range(layers):
            merges.append(min(each + (layer < extra), left // 2))
            left -= merges[-1]
        if left == budget:
            return merges
    raise ValueError(
        f"budget is {budget}; allowed: {left} to {patches} with {layers} layers, because a layer "
        "merges at most half of its patches"
    )


def tome(tower: Any, pixel_values: Tensor, budget: int, *, feature_layer: int = -2) -> Tensor:
    """Features for the projector instead of those of all patches.

    In every layer, between attention and MLP:

    1. Tokens at even places may merge into tokens at odd places; CLS, at place 0, may not.
    2. Each of the former finds the latter with the most similar key (mean over the heads).
    3. The pairs with the highest similarity merge: the mean of both, weighted by size.
    4. The new order: even places that did not merge, then odd places.

    From the next layer on, attention adds the logarithm of a token's size to its logits.

    Args:
        tower: a `CLIPVisionModel` or the `vision_model` in it.
        pixel_values: (B, 3, H, W), of the size that the tower was built for.
        budget: tokens to return, at least 1; all there are or more changes nothing.
        feature_layer: which of the tower's hidden states LLaVA reads (`vision_feature_layer`).

    Returns:
        (B, min(budget, N), C) without CLS, in the order of the first patch in each; dtype of the
        tower. Sums are float32.

    Raises:
        TypeError: the budget is no int.
        ValueError: it is below 1, or too few for the number of layers (see `merge_schedule`).
    """
    check_count("budget", budget)
    tower = getattr(tower, "vision_model", tower)
    layers = tower.encoder.layers
    # Hidden states are counted from the input of the first layer: one more than there are layers.
    layers = layers[: range(len(layers) + 1)[feature_layer]]
    with torch.no_grad():
        pictures = [merged_tokens(tower, layers, picture[None], budget) for picture in pixel_values]
        return torch.stack(
            [
                tokens.features.index_select(0, torch.argsort(tokens.first)[1:])
                for tokens in pictures
            ]
        )


def merged_tokens(tower: Any, layers: Any, picture: Tensor, budget: int) -> Tokens:
    """Run the tower on one picture.

    Args:
        tower: with the embeddings and the norm before the first layer.
        layers: the encoder layers to run, in order.
        picture: (1, 3, H, W).
        budget: patch tokens that shall be left, at least 1.

    Returns:
        min(budget, N) + 1 tokens, CLS included.
    """
    features = tower.pre_layrnorm(tower.embeddings(picture))[0]
    count = features.shape[0]
    tokens = Tokens(
        features,
        torch.ones(count, device=features.device),
        torch.arange(count, device=features.device),
    )
    patches = count - 1
    merges = merge_schedule(patches, min(budget, patches), len(layers)) if len(layers) else []
    for layer, pairs in zip(layers, merges, strict=True):
        attended, keys = attend(layer.self_attn, layer.layer_norm1(tokens.features), tokens.sizes)
        tokens = merge(tokens._replace(features=tokens.features + attended), keys, pairs)
        mlp = layer.mlp(layer.layer_norm2(tokens.features))
        tokens = tokens._replace(features=tokens.features + mlp)
    return tokens


def attend(attention: Any, features: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's attention, in which a token counts as often as there are patches in it.

    Args:
        attention: a `CLIPAttention`.
        features: (T, C), normalised for it.
        sizes: (T,).

    Returns:
        (T, C) what it adds to the tokens, and (T, C / heads) the keys, mean over the heads.
    """
    count, width = features.shape

    def heads(projected: Tensor) -> Tensor:
        return projected.view(count, -1, attention.head_dim).transpose(0, 1)

    keys = heads(attention.k_proj(features))
    attended = functional.scaled_dot_product_attention(
        heads(attention.q_proj(features))[None],
        keys[None],
        heads(attention.v_proj(features))[None],
        attn_mask=sizes.log().to(features.dtype).expand(1, 1, count, count),
        scale=attention.scale,
    )[0]
    attended = attention.out_proj(attended.transpose(0, 1).reshape(count, width))
    return attended, keys.float().mean(dim=0)


def merge(tokens: Tokens, keys: Tensor, pairs: int) -> Tokens:
    """Steps 1 to 4: merge the most similar pairs.

    Args:
        tokens: T of them, CLS at place 0.
        keys: (T, K) compared by cosine.
        pairs: how many, 0 to (T - 1) / 2 rounded down.

    Returns:
        T - `pairs` tokens, CLS at place 0.
    """
    if pairs == 0:
        return tokens
    similarity = cosines(keys[0::2], keys[1::2])
    similarity[0] = -torch.inf  # CLS merges into nothing
    highest, partner = similarity.max(dim=1)
    ranking = rank(highest)
    leaving, staying = ranking[:pairs], torch.sort(ranking[pairs:]).values
    partner = partner.index_select(0, leaving)

    even = Tokens(*(tensor[0::2] for tensor in tokens))
    odd = Tokens(*(tensor[1::2] for tensor in tokens))
    # Products with a 0/1 matrix instead of a scattered sum, whose order varies on a GPU.
    places = torch.arange(odd.sizes.shape[0], device=partner.device)
    joins = (places[:, None] == partner).float()
    left = even.sizes.index_select(0, leaving)
    sizes = odd.sizes + joins @ left
    total = odd.features.float() * odd.sizes[:, None] + joins @ (
        even.features.index_select(0, leaving).float() * left[:, None]
    )
    features = (total / sizes[:, None]).to(odd.features.dtype)
    first = odd.first.scatter_reduce(0, partner, even.first.index_select(0, leaving), "amin")
    return Tokens(
        torch.cat([even.features.index_select(0, staying), features]),
        torch.cat([even.sizes.index_select(0, staying), sizes]),
        torch.cat([even.first.index_select(0, staying), first]),
    )
