# SPDX-License-Identifier: Apache-2.0
"""How well scores and kept tokens match the object in question (Table 3), by drawn boxes.

The paper gives no formulas; these are ours. With scores ``s`` over N patches, ``p = s / sum(s)``,
patch places ``x_i`` in units of a patch, the box's patches ``B`` and the kept ones ``K``:

* attention distance: ``| sum_i p_i x_i  -  centre of the box |``, in patches;
* score-map entropy: ``- sum_i p_i ln p_i``, in nats; even scores over 576 patches have 6.36;
* token-box IoU: ``|K & B| / |K | B|``, and coverage: ``|K & B| / |B|``. A box has 9 to 49 patches,
  so at 128 kept tokens even a perfect choice has a low IoU; coverage has no such bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.inside.llama import Llama
from benchmarks.accuracy.inside.sparsevlm import raters, schedule
from benchmarks.accuracy.reference import AFTER, BEFORE, PLACES, Reference, Seen
from benchmarks.accuracy.rows import Prepared
from benchmarks.accuracy.sets import Item, box_patches
from flashvlm_vllm.selection import LanguageAttention, fused_scores, run_selector
from flashvlm_vllm.selection.flashvlm_2 import coherent_scores, standardised
from flashvlm_vllm.selection.llm_attention import attended_scores
from flashvlm_vllm.selection.registry import find_selector
from flashvlm_vllm.selection.relevance import gated_text, query_relevance, text_similarity
from flashvlm_vllm.selection.select import PUBLISHED
from small_vlm.scenes import COLORS, KINDS, PATCH, SIDE

Scores = Callable[[Reference, Item, Seen, Tensor], Tensor]
"""From a picture and the words' embeddings to (N,) scores, at least 0."""


def distance(scores: Tensor, item: Item) -> float:
    """Return the attention distance in patches."""
    assert item.about is not None
    left, top, right, bottom = item.about.box
    centre = torch.tensor([(top + bottom) / 2 / PATCH - 0.5, (left + right) / 2 / PATCH - 0.5])
    rows, columns = np.divmod(np.arange(len(scores)), SIDE)
    places = torch.tensor(np.stack([rows, columns], 1), dtype=torch.float32)
    weight = scores / scores.sum()
    return float(torch.linalg.vector_norm(weight @ places - centre))


def entropy(scores: Tensor) -> float:
    """Return the entropy of a score map in nats."""
    weight = scores / scores.sum()
    return float(torch.special.entr(weight).sum())


def overlap(kept: Tensor, item: Item) -> tuple[float, float]:
    """Return IoU and coverage of the box by the kept patches."""
    assert item.about is not None
    box, chosen = set(box_patches(item.about)), set(kept.tolist())
    both = len(box & chosen)
    return both / len(box | chosen), both / len(box)


def flashvlm_scores(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """The fused score."""
    return fused_scores(seen.projected, seen.saliency, text)


def saliency_scores(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """CLS attention, by which VisPruner ranks tokens."""
    return seen.saliency


def coherent_weights(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """The weight in the determinant."""
    scores = coherent_scores(seen.projected, seen.saliency, text, PLACES)
    return standardised(scores).exp()


def _prompt(reference: Reference, item: Item, seen: Seen) -> tuple[Tensor, slice]:
    head = reference.words(BEFORE)
    tail = reference.words(f"{item.question.text} {AFTER}")
    visual = slice(len(head), len(head) + len(seen.projected))
    return torch.cat([head, seen.projected, tail]), visual


def fastv_scores(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """The last prompt token's attention in the layer before FastV prunes (1)."""
    embeddings, visual = _prompt(reference, item, seen)
    llama, places = Llama(reference.model), torch.arange(len(embeddings))
    with torch.inference_mode():
        hidden = llama.layer(0, embeddings, places)
        return llama.attention(1, hidden, places, places[-1:])[0][visual]


def sparsevlm_scores(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """The text raters' attention in SparseVLM's first pruning layer."""
    embeddings, visual = _prompt(reference, item, seen)
    llama, places = Llama(reference.model), torch.arange(len(embeddings))
    first = min(schedule(len(llama.layers), len(seen.projected), 64))
    with torch.inference_mode():
        rating = visual.stop + raters(embeddings[visual], embeddings[visual.stop :])
        hidden = embeddings
        for layer in range(first):
            hidden = llama.layer(layer, hidden, places)
        attention = llama.attention(first, hidden, places, rating)
        return attention[:, visual].mean(dim=0)


def attended(reference: Reference, item: Item, seen: Seen, text: Tensor) -> Tensor:
    """The score of ``llm-attention``, from which its weights in the determinant are made."""
    attention = reference.attention(find_selector("llm-attention"), seen, text)
    assert attention is not None
    return attended_scores(attention.read, PLACES)


INSIDE: Final = ("fastv", "sparsevlm")
"""Methods that prune inside the language model."""
SCORES: Final[dict[str, Scores]] = {
    "fastv": fastv_scores,
    "sparsevlm": sparsevlm_scores,
    "vispruner": saliency_scores,
    "flashvlm": flashvlm_scores,
    "flashvlm-2": coherent_weights,
    "llm-attention": attended,
}


def kept_by(
    name: str,
    scores: Tensor,
    seen: Seen,
    text: Tensor,
    attention: LanguageAttention | None,
    budget: int,
) -> Tensor:
    """Return which patches a method keeps; those inside the model keep their best scores."""
    if name in INSIDE:
        return scores.topk(budget).indices
    tokens = seen.tokens(budget, text, attention=attention)
    chosen = run_selector(name, find_selector(name), tokens, trusted=True)
    assert chosen.indices is not None
    return chosen.indices


def measure(
    reference: Reference, prepared: Prepared, budgets: tuple[int, ...]
) -> dict[str, dict[str, list[float]]]:
    """Return per method and metric its mean and standard error.

    Over the questions that ask for an object there is; ``count`` says how many.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, scores in SCORES.items():
        values: dict[str, list[float]] = {"distance": [], "entropy": []}
        for budget in budgets:
            values |= {f"iou {budget}": [], f"coverage {budget}": []}
        for item, looks, text in zip(prepared.items, prepared.looks, prepared.texts, strict=True):
            if item.about is None:
                continue
            seen = looks[0]
            map_ = scores(reference, item, seen, text)
            values["distance"].append(distance(map_, item))
            values["entropy"].append(entropy(map_))
            attention = None
            if name not in INSIDE:
                attention = reference.attention(find_selector(name), seen, text)
            for budget in budgets:
                kept = kept_by(name, map_, seen, text, attention, budget)
                iou, coverage = overlap(kept, item)
                values[f"iou {budget}"].append(iou)
                values[f"coverage {budget}"].append(coverage)
        count = len(values["distance"])
        found[name] = {
            metric: [float(np.mean(each)), float(np.std(each, ddof=1) / count**0.5)]
            for metric, each in values.items()
        } | {"count": [count]}
    return found


def alignment(reference: Reference, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Return how near patches are to words, inside the asked object's box and outside it.

    Per group of the question's words: the largest cosine of a patch to any of them, on average
    over the patches ``inside`` and ``outside``, and the ``auc``: how often a patch inside is
    nearer than one outside. Where that is 0.5 the words say nothing. ``weight`` is what eq 5's
    softmax gives the group, over the patches inside.
    """
    found = {}
    for group in WORD_GROUPS:
        values: dict[str, list[float]] = {"inside": [], "outside": [], "auc": [], "weight": []}
        for item, looks, text in zip(prepared.items, prepared.looks, prepared.texts, strict=True):
            said = item.question.text.split()
            assert len(said) == len(text)
            chosen = [row for row, word in enumerate(said) if belongs(word, group)]
            if item.about is None or not chosen:
                continue
            unit = torch.nn.functional.normalize
            nearest = (unit(looks[0].projected) @ unit(text[chosen]).T).amax(dim=1)
            mask = torch.zeros(len(nearest), dtype=torch.bool)
            mask[box_patches(item.about)] = True
            within, beyond = nearest[mask], nearest[~mask]
            values["inside"].append(float(within.mean()))
            values["outside"].append(float(beyond.mean()))
            values["auc"].append(float((within[:, None] > beyond).float().mean()))
            gated = gated_text(text, PUBLISHED.query_gate, PUBLISHED.epsilon)
            similarity = text_similarity(looks[0].projected[mask], gated)
            weights = torch.softmax(similarity / PUBLISHED.aggregation_temperature, dim=1)
            values["weight"].append(float(weights[:, chosen].sum(dim=1).mean()))
        found[group] = {name: float(np.mean(each)) for name, each in values.items()}
    return found


def above_the_floor(prepared: Prepared) -> float:
    """Return how many patches have a relevance (eq 6) of 0.1 or more, on average.

    The others are told apart by their saliency and by what eq 7's logarithm makes of next to
    nothing.
    """
    counts = [
        int((query_relevance(looks[0].projected, text, PUBLISHED) >= 0.1).sum())
        for looks, text in zip(prepared.looks, prepared.texts, strict=True)
    ]
    return float(np.mean(counts))


WORD_GROUPS: Final = ("all words", "colours", "shapes and letters", "all other words")


def belongs(word: str, group: str) -> bool:
    """Return whether a word of a question belongs to a group."""
    if group == "colours":
        return word in COLORS
    if group == "shapes and letters":
        return word in KINDS
    return group == "all words" or word not in (*COLORS, *KINDS)
