# SPDX-License-Identifier: Apache-2.0
"""The variants that were tried: how tokens are scored, and how they are chosen by their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.accuracy.layer_attention import LayerAttention, times_ratio
from benchmarks.accuracy.reference import PLACES
from benchmarks.language_attention.observed import Observed
from flashvlm_vllm.selection import SelectionConfig
from flashvlm_vllm.selection.determinant import largest_determinant_of_any
from flashvlm_vllm.selection.flashvlm_2 import HIGHEST, LEAST, standardised
from flashvlm_vllm.selection.fusion import fuse
from flashvlm_vllm.selection.llm_attention import AVERAGED, SHARPNESS, WEIGHT_POWER
from flashvlm_vllm.selection.neighbours import mean_of_near
from flashvlm_vllm.selection.partition import partition, rank
from flashvlm_vllm.selection.relevance import attenuate_below_gate, sharpen, text_similarity
from flashvlm_vllm.selection.saliency import intrinsic_saliency
from flashvlm_vllm.selection.scaling import min_max, unit_rows
from small_vlm.scenes import SIDE

SECOND: Final = 1
"""Index of the second decoder layer."""
CLUSTERS: Final = 48
FOUND: Final = 0.35
"""Largest share of one token in what a head reads, from which the highest scores were kept."""
POWER: Final = 2.0
"""Exponent of the score as weight, where the second layer was read alone."""

Score = Callable[[Observed], Tensor]
"""From a picture and question to one score per token, (N,)."""
Choice = Callable[[Tensor, Observed, int], Tensor]
"""From scores, picture and budget to the kept tokens, (T,) int64."""


@dataclass(frozen=True)
class Variant:
    """One way to select tokens."""

    group: str
    name: str
    score: Score
    choice: Choice

    def kept(self, observed: Observed, budget: int) -> Tensor:
        """Return the kept tokens, (T,) int64 ascending."""
        return torch.sort(self.choice(self.score(observed), observed, budget)).values


# Scores.


def weighted(own: LayerAttention) -> Tensor:
    """Return what the words read, (H, R, N)."""
    return own.read


def largest(read: Tensor) -> Tensor:
    """Return the largest over heads and words."""
    return read.amax(dim=(0, 1))


def mean_of_heads(read: Tensor) -> Tensor:
    """Return the mean over heads, the largest over words."""
    return read.mean(dim=0).amax(dim=0)


def attended(
    layer: int = SECOND,
    *,
    of: Callable[[LayerAttention], Tensor] = weighted,
    rows: Callable[[Observed, Tensor], Tensor] = lambda observed, values: values,
    reduce: Callable[[Tensor], Tensor] = largest,
    averaged: int = AVERAGED,
    bare: bool = False,
) -> Score:
    """Return the score by one layer, or a variant of it.

    Args:
        layer: index of the decoder layer.
        of: from a layer to values per head, word and token.
        rows: which of the words count.
        reduce: from (H, R, N) to (N,).
        averaged: how often scores are averaged over neighbours.
        bare: without the words before the picture.

    """

    def score(observed: Observed) -> Tensor:
        layers = observed.bare if bare else observed.layers
        values = reduce(rows(observed, of(layers[layer])))
        return mean_of_near(values, PLACES, averaged)

    return score


def without_template(observed: Observed, values: Tensor) -> Tensor:
    """Return the rows of the question's words."""
    return values[:, : observed.words]


def last_word(observed: Observed, values: Tensor) -> Tensor:
    """Return the row of the last word before the answer."""
    return values[:, -1:]


def template_only(observed: Observed, values: Tensor) -> Tensor:
    """Return the rows of the template's words."""
    return values[:, observed.words :]


def first_trial(layer: int) -> Score:
    """Return the first trial's score: log attention in place of ``flashvlm-2``'s cosines."""

    def score(observed: Observed) -> Tensor:
        mean = observed.layers[layer].weights.mean(dim=0)[: observed.words]
        by_word = standardised(mean.clamp_min(LEAST).log().T)
        return mean_of_near(salient(observed) + 3.0 * standardised(by_word.amax(dim=1)), PLACES)

    return score


def salient(observed: Observed) -> Tensor:
    """Return the standardised log saliency, (N,)."""
    return standardised(observed.seen.saliency.float().clamp_min(LEAST).log())


def similar(observed: Observed) -> Tensor:
    """Return ``flashvlm-2``'s standardised similarity to the nearest word, (N,)."""
    by_word = text_similarity(observed.seen.projected, unit_rows(observed.text))
    return standardised(standardised(by_word).amax(dim=1))


def with_term(term: Score, weight: float) -> Score:
    """Add a standardised term to the standardised score, before averaging."""
    alone = attended(averaged=0)

    def score(observed: Observed) -> Tensor:
        both = standardised(alone(observed)) + weight * term(observed)
        return mean_of_near(both, PLACES, AVERAGED)

    return score


def minus_empty(observed: Observed) -> Tensor:
    """Subtract what the template's words read without a question."""
    own = weighted(observed.layers[SECOND]).amax(dim=(0, 1))
    empty = weighted(observed.empty[SECOND]).amax(dim=(0, 1))
    return mean_of_near((own - empty).clamp_min(0.0), PLACES, AVERAGED)


def contrast(observed: Observed) -> Tensor:
    """Weight each word's attention by its ratio to the mean over the words."""
    own = weighted(observed.layers[SECOND])
    ratio = own / own.mean(dim=1, keepdim=True).clamp_min(LEAST)
    return mean_of_near((own * ratio).amax(dim=(0, 1)), PLACES, AVERAGED)


def several(
    layers: Sequence[int] = (SECOND, SECOND + 1),
    *,
    of: Callable[[Observed], Sequence[LayerAttention]] = lambda observed: observed.after_first,
    reduce: Callable[[Tensor], Tensor] = lambda read: times_ratio(read).mean(dim=0).amax(dim=0),
    power: float = SHARPNESS,
    averaged: int = AVERAGED,
) -> Score:
    """Return the score of several layers, or a variant of it.

    Args:
        layers: indices of the decoder layers.
        of: how the visual tokens get there.
        reduce: from what is read in a layer, (H, R, N), to (N,).
        power: of each layer's share, before they are added.
        averaged: how often scores are averaged over neighbours.

    """

    def score(observed: Observed) -> Tensor:
        every = of(observed)
        found = [reduce(weighted(every[layer])) for layer in layers]
        total = torch.stack([(each / each.mean()).pow(power) for each in found]).sum(dim=0)
        return mean_of_near(total, PLACES, averaged)

    return score


def all_pass(observed: Observed) -> Sequence[LayerAttention]:
    """Return the layers as they are in the model."""
    return observed.layers


def in_equations(*, sharpened: bool) -> Score:
    """Return eq 7 with this relevance in the place of eq 5's, with or without eq 6."""
    config = SelectionConfig()

    def score(observed: Observed) -> Tensor:
        relevance = min_max(attended()(observed), config.epsilon)
        if sharpened:
            relevance = sharpen(
                relevance,
                config.sharpening_temperature,
                config.sharpening_power,
                config.epsilon,
            )
            relevance = attenuate_below_gate(relevance, config.gate_fraction, config.attenuation)
        intrinsic = intrinsic_saliency(observed.seen.saliency, config.epsilon)
        return fuse(intrinsic, min_max(relevance, config.epsilon), config)

    return score


# Choices.


def highest(scores: Tensor, observed: Observed, budget: int) -> Tensor:
    """Keep the tokens with the highest scores."""
    return rank(scores)[:budget]


def determinant(sharpness: float) -> Choice:
    """Keep tokens with high scores that differ, as ``flashvlm-2`` does."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        weight = (sharpness * standardised(scores)).clamp(-HIGHEST, HIGHEST).exp()
        return largest_determinant_of_any(observed.seen.features, weight, budget)

    return choose


def determinant_of(power: float) -> Choice:
    """Keep tokens with high scores that differ; the weight is a power of the score."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        weight = (scores / scores.mean()).pow(power).clamp_min(LEAST)
        return largest_determinant_of_any(observed.seen.features, weight, budget)

    return choose


def largest_share(observed: Observed) -> float:
    """Return the largest share that one token has in what one head reads for one word."""
    read = weighted(observed.layers[SECOND])
    return float((read.amax(dim=2) / read.sum(dim=2)).amax())


def where_found(share: float) -> Choice:
    """Keep the highest scores where a token has more than this share, else as `determinant_of`."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        own = highest if largest_share(observed) > share else determinant_of(POWER)
        return own(scores, observed, budget)

    return choose


def halves(scores: Tensor, observed: Observed, budget: int) -> Tensor:
    """Keep the paper's two halves: the highest scores, and the most different of the rest."""
    return partition(scores, observed.seen.features, budget, 0.5, 8)


def with_different(share: float) -> Choice:
    """Keep the highest scores, and for a share of the budget high scores that differ."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        rest = int(share * budget)
        first = highest(scores, observed, budget - rest)
        left = torch.ones(len(scores), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
        weight = (scores / scores.mean()).clamp_min(LEAST)[left]
        chosen = largest_determinant_of_any(observed.seen.features[left], weight, rest)
        return torch.cat([first, left[chosen]])

    return choose


def with_rest(share: float, *, salient_rest: bool) -> Choice:
    """Keep the highest scores, and a share of evenly spaced or salient tokens."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        rest = int(share * budget)
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[highest(scores, observed, budget - rest)] = True
        if salient_rest:
            left = observed.seen.saliency.masked_fill(kept, -torch.inf)
            kept[rank(left)[:rest]] = True
        else:
            left = (~kept).nonzero()[:, 0]
            kept[left[(2 * torch.arange(rest) + 1) * len(left) // (2 * rest)]] = True
        return kept.nonzero()[:, 0]

    return choose


def whole_groups(groups: Callable[[Observed], Tensor]) -> Choice:
    """Keep whole groups of tokens by their mean score; the last group in part."""

    def choose(scores: Tensor, observed: Observed, budget: int) -> Tensor:
        of_token = groups(observed)
        sums = torch.zeros(int(of_token.max()) + 1).index_add(0, of_token, scores)
        means = sums / torch.bincount(of_token, minlength=len(sums)).clamp_min(1)
        lifted = means[of_token] * 1e6 + scores / scores.abs().amax().clamp_min(LEAST)
        return highest(lifted, observed, budget)

    return choose


def squares(side: int) -> Callable[[Observed], Tensor]:
    """Group tokens into squares of ``side`` x ``side``."""

    def groups(observed: Observed) -> Tensor:
        block = PLACES // side
        return block[:, 0] * -(-SIDE // side) + block[:, 1]

    return groups


def clusters(observed: Observed) -> Tensor:
    """Group tokens by the most similar of `CLUSTERS` tokens that differ most from one another."""
    unit = unit_rows(observed.seen.features)
    nearest = unit @ unit[0]
    centres = [0]
    for _ in range(CLUSTERS - 1):
        centres.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[centres[-1]])
    return (unit @ unit[centres].T).argmax(dim=1)


def variants(layers: int) -> list[Variant]:
    """Return all variants for a model of so many decoder layers."""
    base = attended()
    tried = [
        Variant("layer", f"layer {layer + 1} of {layers}", attended(layer), highest)
        for layer in range(layers)
    ]
    tried += [
        Variant("signal", "first trial: log attention of the words, mean over heads, saliency", 
                first_trial(SECOND), determinant(1.0)),
        Variant("signal", "attention without values",
                attended(of=lambda own: own.weights), highest),
        Variant("signal", "values after the output projection",
                attended(of=lambda own: own.weights * own.outputs[:, None]), highest),
        Variant("signal", "square root of attention times value",
                attended(reduce=lambda values: values.amax(dim=(0, 1)).sqrt()), highest),
        Variant("words", "the question's words only", attended(rows=without_template), highest),
        Variant("words", "the template's words only", attended(rows=template_only), highest),
        Variant("words", "the last word before the answer only", attended(rows=last_word), highest),
        Variant("words", "sum over the words, largest over heads",
                attended(reduce=lambda values: values.amax(dim=0).sum(dim=0)), highest),
        Variant("words", "without the words before the picture", attended(bare=True), highest),
        Variant("heads", "mean over heads, largest over words",
                attended(reduce=mean_of_heads), highest),
        Variant("heads", "mean over heads and words",
                attended(reduce=lambda values: values.mean(dim=(0, 1))), highest),
        Variant("position", "minus what an empty question reads", minus_empty, highest),
        Variant("position", "times the ratio to the mean over words", contrast, highest),
    ]  # fmt: skip
    tried += [
        Variant("saliency", f"plus {weight:g} x saliency", with_term(salient, weight), highest)
        for weight in (0.1, 0.3, 1.0)
    ]
    tried.append(
        Variant("saliency", "plus 0.3 x cosine to the words", with_term(similar, 0.3), highest)
    )
    tried += [
        Variant("neighbours", f"averaged {times} times", attended(averaged=times), highest)
        for times in (0, 1, 2, 3, 6, 8)
    ]
    tried += [
        Variant("choice", f"determinant, weight exp({sharpness:g} x standardised score)", base,
                determinant(sharpness))
        for sharpness in (0.5, 1.0, 2.0)
    ]  # fmt: skip
    tried += [
        Variant("choice", f"determinant, weight score^{power:g}", base, determinant_of(power))
        for power in (1.0, POWER, 3.0)
    ]
    tried += [
        Variant("choice", f"the highest where a head reads over {share:.0%} from one token, "
                f"else score^{POWER:g}", base, where_found(share))
        for share in (0.25, 0.3, FOUND, 0.45)
    ]  # fmt: skip
    tried += [
        Variant("choice", "the paper's two halves", base, halves),
        Variant("choice", "a quarter evenly spaced", base, with_rest(0.25, salient_rest=False)),
        Variant("choice", "a quarter by saliency", base, with_rest(0.25, salient_rest=True)),
        Variant("coarse to fine", "whole squares of 2 x 2", base, whole_groups(squares(2))),
        Variant("coarse to fine", "whole squares of 4 x 4", base, whole_groups(squares(4))),
        Variant("coarse to fine", "whole clusters of similar tokens", base, whole_groups(clusters)),
        Variant("the paper's equations", "eq 7 and Algorithm 1 with this relevance",
                in_equations(sharpened=False), halves),
        Variant("the paper's equations", "eq 6, 7 and Algorithm 1 with this relevance",
                in_equations(sharpened=True), halves),
    ]  # fmt: skip
    return tried + [each for each in of_several_layers() if layers > SECOND + 2]


def of_several_layers() -> list[Variant]:
    """Return the variants that read more than one layer."""
    tried = [
        Variant("several layers", name, score, highest)
        for name, score in (
            ("second and third, largest over heads, added",
             several(of=all_pass, reduce=largest, power=1.0)),
            ("the same squared before they are added", several(of=all_pass, reduce=largest)),
            ("the same, mean over heads", several(of=all_pass, reduce=mean_of_heads)),
            ("the same, times the ratio to the head's mean over words", several(of=all_pass)),
            ("the same, the visual tokens pass the first layer only", several()),
            ("the same, the visual tokens pass no layer",
             several(of=lambda observed: observed.as_projected)),
            ("the visual tokens pass the first layer only, not squared", several(power=1.0)),
            ("the visual tokens pass the first layer only, cubed", several(power=3.0)),
            ("the visual tokens pass the first layer only, second to fourth",
             several((SECOND, SECOND + 1, SECOND + 2))),
        )
    ]  # fmt: skip
    return tried + [
        Variant("choice by both layers", name, several(), choice)
        for name, choice in (
            *((f"determinant, weight score^{power:g}", determinant_of(power))
              for power in (1.0, 1.5, 2.0)),
            ("the highest for half of the budget, determinant, weight score^1",
             with_different(0.5)),
            ("the paper's two halves", halves),
        )
    ] + of_some_tokens()  # fmt: skip


def of_some_tokens() -> list[Variant]:
    """Return the variants in which some of the visual tokens pass the first layer."""
    half = "every other token as on a checkerboard"
    of: dict[str, Callable[[Observed], Sequence[LayerAttention]]] = {
        half: lambda observed: observed.checkerboard,
        "every other column": lambda observed: observed.columns,
        "a quarter": lambda observed: observed.quarter,
        "a checkerboard without the others' keys": lambda observed: observed.alone,
    }
    tried = [(name, AVERAGED, WEIGHT_POWER) for name in of]
    tried += [(half, averaged, WEIGHT_POWER) for averaged in (2, 3)]
    tried += [(half, AVERAGED, power) for power in (1.0, 2.0)]
    return [
        Variant("some tokens", f"{name}, averaged {averaged} times, determinant, score^{power:g}",
                several(of=of[name], averaged=averaged), determinant_of(power))
        for name, averaged, power in tried
    ] + [
        Variant("some tokens", f"{half}, averaged {AVERAGED} times, the highest",
                several(of=of[half]), highest)
    ]  # fmt: skip
