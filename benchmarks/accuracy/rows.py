# SPDX-License-Identifier: Apache-2.0
"""The rows of the tables: methods that answer a question about images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy.inside.fastv import fastv
from benchmarks.accuracy.inside.sparsevlm import schedule, sparsevlm
from benchmarks.accuracy.inside.tome import tome
from benchmarks.accuracy.reference import (
    AFTER,
    ANSWER_TOKENS,
    BEFORE,
    PLACES,
    Reference,
    Seen,
)
from benchmarks.accuracy.sets import Item, nearest_patches
from flashvlm_vllm.selection import (
    ABLATIONS,
    SelectionConfig,
    run_selector,
    select_visual_tokens,
)
from flashvlm_vllm.selection.flashvlm_2 import coherent_scores, select_coherent
from flashvlm_vllm.selection.partition import partition
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector
from small_vlm.architecture import normalized
from small_vlm.checkpoint import EOS
from small_vlm.scenes import PATCH, SIDE

BATCH: Final = 32


@dataclass(frozen=True)
class Prepared:
    """A test set, encoded."""

    items: list[Item]
    looks: list[list[Seen]]
    """Per item, per frame."""
    texts: list[Tensor]
    """Embeddings of the words that steer, (L, D): those of the question."""


def prepare(reference: Reference, items: list[Item]) -> Prepared:
    """Encode every picture once."""
    looks = [reference.look(item.pictures()) for item in items]
    return Prepared(items, looks, [reference.words(item.question.text) for item in items])


Choose = Callable[[Reference, Item, Seen, Tensor, int, int], Tensor]
"""From a frame (its number comes first of the two, then its budget) to embeddings (T, D)."""


def answers(reference: Reference, prepared: Prepared, choose: Choose, budget: int) -> list[str]:
    """Answer every question of a set after a choice at the boundary; ``budget`` per item."""
    visual = [
        torch.cat(
            [
                choose(reference, item, seen, text, frame, budget // len(looks))
                for frame, seen in enumerate(looks)
            ]
        )
        for item, looks, text in zip(prepared.items, prepared.looks, prepared.texts, strict=True)
    ]
    return _answer_all(reference, prepared, visual)


Answer = Callable[[Reference, Prepared, int], list[str]]
"""Answers a whole set with a budget per question."""

LEAST: Final = {"tome": 36}
"""ToMe halves at most in each of the four layers before the features leave the tower."""


def unpruned(
    reference: Reference, item: Item, seen: Seen, text: Tensor, frame: int, budget: int
) -> Tensor:
    """Keep all tokens."""
    return seen.projected


def oracle(
    reference: Reference, item: Item, seen: Seen, text: Tensor, frame: int, budget: int
) -> Tensor:
    """Keep the tokens nearest to the object in question.

    Where it is not (another frame, or asked for and absent), evenly spaced tokens stay.
    """
    if item.about is None or frame not in item.frames_with_it():
        count = len(seen.projected)
        return seen.projected[(2 * torch.arange(budget) + 1) * count // (2 * budget)]
    return seen.projected[torch.tensor(nearest_patches(item.about, budget))]


def by_selector(name: str) -> Choose:
    """Return a selector of the server by its name."""
    selector = find_selector(name)

    def choose(
        reference: Reference, item: Item, seen: Seen, text: Tensor, frame: int, budget: int
    ) -> Tensor:
        seed = item.frames[frame].seed
        attention = reference.attention(selector, seen, text)
        tokens = seen.tokens(budget, text, seed, attention)
        chosen = run_selector(name, selector, tokens, trusted=True)
        if chosen.merged is not None:
            return reference.project(chosen.merged)
        return seen.projected[chosen.indices]

    return choose


def with_positions_kept(name: str) -> Answer:
    """Return a selector of the server whose tokens keep their positions in the whole picture.

    vLLM numbers a LLaVA's prompt without gaps, so pruned tokens move up; this is what that costs.
    """
    selector = find_selector(name)

    def run(reference: Reference, prepared: Prepared, budget: int) -> list[str]:
        visual, kept = [], []
        for item, (seen,), text in zip(prepared.items, prepared.looks, prepared.texts, strict=True):
            attention = reference.attention(selector, seen, text)
            tokens = seen.tokens(budget, text, item.frames[0].seed, attention)
            chosen = run_selector(name, selector, tokens, trusted=True)
            assert chosen.indices is not None
            kept.append(chosen.indices)
            visual.append(seen.projected[chosen.indices])
        return _answer_all(reference, prepared, visual, kept)

    return run


def coherent(*, neighbours: bool = True, words: bool = True, halves: bool = False) -> Choose:
    """Return ``flashvlm-2`` without one of its parts.

    Args:
        neighbours: whether they share their scores.
        words: whether the question counts.
        halves: the paper's partition in place of the determinant.

    """

    def choose(
        reference: Reference, item: Item, seen: Seen, text: Tensor, frame: int, budget: int
    ) -> Tensor:
        # Places two apart have no neighbours.
        places = PLACES if neighbours else 2 * PLACES
        asked = text if words else None
        if halves:
            scores = coherent_scores(seen.projected, seen.saliency, asked, places)
            kept = partition(scores, seen.features, budget, 0.5, 8)
        else:
            kept = select_coherent(
                seen.projected, seen.saliency, asked, budget, seen.features, places
            )
        return seen.projected[kept]

    return choose


def by_config(config: SelectionConfig, *, space: str = "tower", scope: str = "user") -> Choose:
    """Return the paper's method with other constants or another reading.

    Args:
        config: the constants.
        space: where Algorithm 1 compares: ``tower`` features or ``projected`` ones.
        scope: which words steer: the ``user``'s, or ``all`` of the prompt, as in released code;
            ``rotated``: the user's, turned by a random rotation, so that they share no space
            with the image.

    """
    generator = torch.Generator().manual_seed(0)
    rotation: list[Tensor] = []

    def choose(
        reference: Reference, item: Item, seen: Seen, text: Tensor, frame: int, budget: int
    ) -> Tensor:
        if scope == "all":
            text = reference.words(f"{BEFORE} {item.question.text} {AFTER}")
        elif scope == "rotated":
            if not rotation:
                width = text.shape[1]
                rotation.append(torch.linalg.qr(torch.randn(width, width, generator=generator))[0])
            text = text @ rotation[0]
        features = seen.features if space == "tower" else seen.projected
        kept = select_visual_tokens(seen.projected, seen.saliency, text, budget, features, config)
        return seen.projected[kept]

    return choose


def downscaled(reference: Reference, prepared: Prepared, budget: int) -> list[str]:
    """Shrink the picture until it costs no more than the budget.

    The tower's position embeddings are interpolated to the smaller grid, as Transformers does.
    """
    side = int((budget / len(prepared.looks[0])) ** 0.5)
    pixels = side * PATCH
    visual = []
    for item in prepared.items:
        small = []
        for picture in item.pictures():
            image = Image.fromarray(picture).resize((pixels, pixels), Image.Resampling.BICUBIC)
            small.append(np.asarray(image))
        with torch.inference_mode():
            out = reference.tower(
                normalized(small), output_hidden_states=True, interpolate_pos_encoding=True
            )
        layer = reference.model.config.vision_feature_layer
        visual.append(reference.project(out.hidden_states[layer][:, 1:]).flatten(0, 1))
    return _answer_all(reference, prepared, visual)


def merged_in_the_tower(reference: Reference, prepared: Prepared, budget: int) -> list[str]:
    """ToMe: merge in every layer of the tower."""
    visual = []
    for item in prepared.items:
        features = tome(reference.tower, normalized(item.pictures()), budget // len(item.frames))
        visual.append(reference.project(features).flatten(0, 1))
    return _answer_all(reference, prepared, visual)


def _answer_all(
    reference: Reference,
    prepared: Prepared,
    visual: Sequence[Tensor],
    kept: Sequence[Tensor] | None = None,
) -> list[str]:
    said: list[str] = []
    for start in range(0, len(visual), BATCH):
        batch = slice(start, start + BATCH)
        asked = [item.question.text for item in prepared.items[batch]]
        said += reference.answer(visual[batch], asked, None if kept is None else kept[batch])
    return said


def inside_the_language_model(method: str) -> Answer:
    """Return FastV (``budget`` tokens from layer 2 on) or SparseVLM (average of the layers)."""

    def run(reference: Reference, prepared: Prepared, budget: int) -> list[str]:
        layers = reference.model.config.text_config.num_hidden_layers
        count = len(prepared.looks[0]) * SIDE * SIDE
        keep = schedule(layers, count, budget) if method == "sparsevlm" else {}

        def logits(embeddings: Tensor, visual: slice, prompt: int) -> Tensor:
            if method == "fastv":
                return fastv(reference.model, embeddings, visual, budget, prompt=prompt)
            return sparsevlm(reference.model, embeddings, visual, keep, prompt=prompt)

        head = reference.words(BEFORE)
        said = []
        for item, looks in zip(prepared.items, prepared.looks, strict=True):
            image = torch.cat([seen.projected for seen in looks])
            tail = reference.words(f"{item.question.text} {AFTER}")
            embeddings = torch.cat([head, image, tail])
            prompt, visual = len(embeddings), slice(len(head), len(head) + len(image))
            ids: list[int] = []
            for _ in range(ANSWER_TOKENS):
                token = int(logits(embeddings, visual, prompt).argmax())
                if token == EOS:
                    break
                ids.append(token)
                new = reference.language.embed_tokens(torch.tensor([token])).detach()
                embeddings = torch.cat([embeddings, new])
            said.append(reference.tokenizer.decode(ids))
        return said

    return run


SWEPT: Final[dict[str, Choose]] = {
    "fusion weight 0.3": by_config(SelectionConfig(text_weight=0.3)),
    "fusion weight 0.7": by_config(SelectionConfig(text_weight=0.7)),
    "temperature 0.01": by_config(SelectionConfig(aggregation_temperature=0.01)),
    "temperature 0.1": by_config(SelectionConfig(aggregation_temperature=0.1)),
    "gate fraction 0.001": by_config(SelectionConfig(gate_fraction=0.001)),
    "gate fraction 0.1": by_config(SelectionConfig(gate_fraction=0.1)),
    "important share 0.3": by_config(SelectionConfig(important_fraction=0.3)),
    "important share 0.7": by_config(SelectionConfig(important_fraction=0.7)),
}
"""The four sweeps of Table 11; the paper's grids are not legible, these are around its defaults
(0.5, 0.05, 0.005 and 0.5)."""

READINGS: Final[dict[str, Choose]] = {
    "gate none": by_config(SelectionConfig(query_gate="none")),
    "gate as released for LLaVA": by_config(SelectionConfig(query_gate="normalized_first")),
    "gate as written": by_config(SelectionConfig(query_gate="normalized_last")),
    "words: the whole prompt": by_config(SelectionConfig(), scope="all"),
    "diversity among projected features": by_config(SelectionConfig(), space="projected"),
    "words and image unaligned (rotated)": by_config(SelectionConfig(), scope="rotated"),
}
"""Where the paper and its released code can be read differently."""

REPEATED: Final[dict[str, Choose]] = {
    f"{name} (Transformers)": by_selector(name)
    for name, selector in BUILT_IN.items()
    if not selector.merges
}
"""What variants are compared with: rounding turns Algorithm 1's choice on the server into another
one, so a variant must be measured where its default is."""

PARTS_OF_2: Final[dict[str, Choose]] = {
    "without neighbours": coherent(neighbours=False),
    "without the question": coherent(words=False),
    "the paper's two halves in place of the determinant": coherent(halves=True),
}
"""``flashvlm-2`` without each of its parts."""

POSITIONS_KEPT: Final[dict[str, Answer]] = {
    f"{name}, positions kept": with_positions_kept(name)
    for name, selector in BUILT_IN.items()
    if not selector.merges
}
"""Merged tokens have no one place that they could keep."""


def closed(selector: str) -> str:
    """Name the row of a served selector whose kept tokens close up."""
    return f"{selector}, positions closed"


POSITIONS_CLOSED: Final = tuple(closed(name) for name in BUILT_IN)

ABLATED: Final[dict[str, Choose]] = {name: by_config(each) for name, each in ABLATIONS.items()}
