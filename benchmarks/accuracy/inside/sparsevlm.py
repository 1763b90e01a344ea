# SPDX-License-Identifier: Apache-2.0
"""SparseVLM v1.5 (arXiv 2410.04417, ICML 2025): image tokens leave after three layers, and the
words that look at the image most decide which; some of the removed ones come back merged.

Written from the description of the method. Deviations and choices of our own:

* **No noise.** Published, densities get random noise of 1e-6 so that none are equal. Here, of
  equally dense tokens the one with the lower index counts as denser, and the result is the same
  every time. All other ties, too, resolve to the lower index.
* **Order.** Merged tokens come in the order of the tokens at the centres of their clusters; the
  description leaves it open.
* **No rater.** Only words above the mean rate. When all are equal, as a single one is, all do.
* **Everything.** A count of all tokens prunes nothing. Published, at least one always leaves; it
  would come back alone, as its own merged token, behind the others.
* **Counts.** Published lists exist for 576 tokens, 32 layers and a few budgets; see `schedule`.
* Tokens that were generated rate nothing and change nothing, as with a KV cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks.accuracy.inside.llama import Llama, locate
from flashvlm_vllm.selection.arguments import check_count
from flashvlm_vllm.selection.partition import rank

# Published: tokens are pruned after these layers of 32, to these counts of 576.
LAYERS: Final = 32
PATCHES: Final = 576
PRUNING_LAYERS: Final = (2, 6, 15)
COUNTS: Final = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


def sparsevlm(
    model: Any,
    inputs_embeds: Tensor,
    visual: slice,
    keep: Mapping[int, int],
    *,
    prompt: int | None = None,
) -> Tensor:
    """Return the logits of the next token, with fewer and fewer image tokens.

    Behind each layer in `keep`:

    1. Score: the attention in that layer that an image token gets from the raters (see `raters`),
       mean over heads and raters. As many as `keep` says stay, in their order.
    2. Of those that leave, a tenth of the best 30 % comes back: merged, behind those that stay
       (see `recycled`, `merged`). In later layers they are image tokens like the others.
    3. Position ids are counted anew, without gaps.

    Args:
        model: a `LlavaForConditionalGeneration` on Llama, or a `LlamaForCausalLM`.
        inputs_embeds: (S, D) of prompt and generated tokens, image included.
        visual: where the N image tokens are; text follows them.
        keep: how many stay, at least 1, by layer, counted from 0. Where there are no more than
            that, nothing happens.
        prompt: how many of the S are the prompt; the rest was generated and stays. None: all.

    Returns:
        (vocabulary,) logits behind the last token, in the dtype of the model.

    Raises:
        TypeError: a count is no int, or `inputs_embeds` is not floating point.
        ValueError: a count is below 1, there is no such layer, or the image is not where `visual`
            says.
    """
    place = locate(inputs_embeds, visual, prompt)
    llama = Llama(model)
    check_keep(keep, len(llama.layers))
    start, count = place.start, place.stop - place.start
    with torch.no_grad():
        hidden = inputs_embeds
        rating = raters(hidden[start : place.stop], hidden[place.stop : place.length])
        for index in range(len(llama.layers)):
            positions = torch.arange(hidden.shape[0], device=hidden.device)
            output = llama.layer(index, hidden, positions)
            if keep.get(index, count) < count:
                stop = start + count
                attention = llama.attention(index, hidden, positions, stop + rating)
                score = attention[:, start:stop].mean(dim=0)
                image = prune(output[start:stop], score, keep[index])
                output = torch.cat([output[:start], image, output[stop:]])
                count = image.shape[0]
            hidden = output
        return llama.logits(hidden)


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """The words that image tokens resemble most: those with more than the mean share of them.

    Args:
        visual: (V, D) embeddings of the image, any float dtype.
        text: (L, D) embeddings of the text behind it.

    Returns:
        (R,) int64 ascending indices into `text`, at least one.
    """
    # Over the text: every image token spreads a weight of one over the words.
    share = torch.softmax(visual.float() @ text.float().T, dim=1).mean(dim=0)
    above = torch.nonzero(share > share.mean())[:, 0]
    return above if above.numel() else torch.arange(text.shape[0], device=text.device)


def prune(tokens: Tensor, score: Tensor, count: int) -> Tensor:
    """Steps 1 and 2.

    Args:
        tokens: (V, D), any float dtype.
        score: (V,) float32.
        count: of them to keep, 1 to V - 1.

    Returns:
        (count + c, D) with c merged tokens as `recycled` says; dtype of `tokens`.
    """
    ranking = rank(score)
    back, centres = recycled(tokens.shape[0] - count)
    kept = torch.sort(ranking[:count]).values
    best = torch.sort(ranking[count : count + back]).values
    again = merged(tokens.index_select(0, best), centres)
    return torch.cat([tokens.index_select(0, kept), again.to(tokens.dtype)])


def recycled(dropped: int) -> tuple[int, int]:
    """How many of the tokens that leave are merged, and into how many.

    Args:
        dropped: at least 0.

    Returns:
        30 % rounded down, plus 1; and a tenth of that, rounded down, plus 1. 0, 0 for none.
    """
    if dropped == 0:
        return 0, 0
    back = 3 * dropped // 10 + 1
    return back, back // 10 + 1


def merged(tokens: Tensor, centres: int) -> Tensor:
    """Cluster by density peaks and take the mean of each cluster.

    A token is dense when its `centres` nearest, itself included, are near. Peaks are tokens that
    are dense and far from any denser one.

    Args:
        tokens: (M, D), any float dtype.
        centres: clusters, 1 to M.

    Returns:
        (centres, D) float32, in the order of their centres.
    """
    tokens = tokens.float()
    count, width = tokens.shape
    # From differences, not products: equal tokens are then at a distance of exactly 0.
    distance = torch.stack([torch.linalg.vector_norm(tokens - one, dim=1) for one in tokens])
    distance = distance / width**0.5
    nearest = torch.sort(distance, dim=1).values[:, :centres]
    density = torch.exp(-nearest.square().mean(dim=1))

    densest_first = rank(density)
    numbers = torch.arange(count, device=tokens.device)
    order = torch.empty_like(numbers).index_copy_(0, densest_first, numbers)
    denser = order[None, :] < order[:, None]
    lonely = torch.where(denser, distance, torch.inf).amin(dim=1)
    lonely[densest_first[0]] = distance.max()

    peaks = torch.sort(rank(density * lonely)[:centres]).values
    cluster = distance.index_select(1, peaks).argmin(dim=1)
    # A peak that equals another still is the centre of its own cluster: none may be empty.
    cluster[peaks] = numbers[:centres]
    joins = (numbers[:centres, None] == cluster).float()
    means: Tensor = joins @ tokens / joins.sum(dim=1, keepdim=True)
    return means


def schedule(layers: int, patches: int, budget: int) -> dict[int, int]:
    """Where to prune and how much, so that the average over the layers meets a budget.

    The layers are the published ones, at the same share of the depth, rounded. The counts are the
    published ones for the nearest budget (per 576 tokens; the smaller one if two are as near)
    times a common factor, rounded down and at least 1. The factor is the largest with which
    `average_tokens`, over what **leaves** each layer and with merged tokens, does not exceed the
    budget. The published lists themselves miss it slightly: 192.03, 128.6 and 64.8.

    Args:
        layers: of the language model, at least 4: fewer leave no layer behind the last pruning.
        patches: image tokens.
        budget: their average, at least 1; `patches` or more prunes nothing.

    Returns:
        What `sparsevlm` takes as `keep`: three layers, ascending, and how many tokens stay.

    Raises:
        TypeError: an argument is no int.
        ValueError: one is out of its range, or even one token behind each pruning (and those
            merged) is more than the budget, because the first layers work on all of them.
    """
    for name, value in (("layers", layers), ("patches", patches), ("budget", budget)):
        check_count(name, value)
    if layers < 4:
        raise ValueError(f"layers is {layers}; allowed: at least 4")
    places = [(2 * layers * place + LAYERS) // (2 * LAYERS) for place in PRUNING_LAYERS]
    nearest = min(COUNTS, key=lambda known: (abs(known * patches - budget * PATCHES), known))

    def scaled(factor: Fraction) -> dict[int, int]:
        left, keep = patches, {}
        for place, count in zip(places, COUNTS[nearest], strict=True):
            keep[place] = min(max(int(factor * count), 1), left)
            left = left_over(left, keep[place])
        return keep

    def average(factor: Fraction) -> float:
        return average_tokens(layers, patches, scaled(factor))

    # The factors at which a count changes. The average never falls from one to the next: one more
    # token that stays is at most one merged token fewer.
    factors = sorted(
        {Fraction(number, count) for count in COUNTS[nearest] for number in range(1, patches + 1)}
    )
    fitting = bisect_right(factors, float(budget), key=average)
    if fitting == 0:
        raise ValueError(
            f"budget is {budget}; allowed: at least {average(factors[0])} with {layers} layers and "
            f"{patches} tokens"
        )
    return scaled(factors[fitting - 1])


def average_tokens(
    layers: int,
    patches: int,
    keep: Mapping[int, int],
    *,
    of: Literal["outputs", "inputs"] = "outputs",
) -> float:
    """How many image tokens there are, merged ones included, averaged over all layers.

    Args:
        layers: of the language model.
        patches: image tokens before the first layer.
        keep: as for `sparsevlm`.
        of: "outputs" counts what leaves each layer, as the paper's budgets do. "inputs" counts
            what each layer works on, as a cost should, and as FastV's `average_tokens` does; it is
            more, because a layer that prunes has worked on all it got.

    Returns:
        The mean.

    Raises:
        TypeError: a count is no int.
        ValueError: one is below 1, or there is no such layer.
    """
    counts = visual_tokens(layers, patches, keep)
    return sum(counts[1:] if of == "outputs" else counts[:-1]) / layers


def visual_tokens(layers: int, patches: int, keep: Mapping[int, int]) -> list[int]:
    """How many image tokens go into the first layer and come out of each.

    Args:
        layers: of the language model.
        patches: image tokens before the first layer.
        keep: as for `sparsevlm`.

    Returns:
        `layers` + 1 numbers.

    Raises:
        TypeError: a count is no int.
        ValueError: one is below 1, or there is no such layer.
    """
    check_count("layers", layers)
    check_count("patches", patches)
    check_keep(keep, layers)
    counts = [patches]
    for layer in range(layers):
        counts.append(left_over(counts[-1], keep.get(layer, counts[-1])))
    return counts


def left_over(count: int, keep: int) -> int:
    """How many tokens a pruning leaves, merged ones included.

    Args:
        count: of tokens before it.
        keep: of them, at least 1.

    Returns:
        At most `count`.
    """
    keep = min(keep, count)
    return keep + recycled(count - keep)[1]


def check_keep(keep: Mapping[int, int], layers: int) -> None:
    """Check where and how much to prune.

    Args:
        keep: as for `sparsevlm`.
        layers: of the language model.

    Raises:
        TypeError: a count is no int.
        ValueError: one is below 1, or there is no such layer.
    """
    for layer, count in keep.items():
        check_count(f"keep[{layer}]", count)
        if layer not in range(layers):
            raise ValueError(f"keep names layer {layer}; allowed: 0 to {layers - 1}")
