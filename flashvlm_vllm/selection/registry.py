# SPDX-License-Identifier: Apache-2.0
"""All selectors by name: the built-in ones, and those that other packages provide."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Final

from torch import Tensor

from flashvlm_vllm.selection.baselines import (
    cdpruner,
    divprune,
    fastv_boundary,
    prumerge_anchors,
    prumerge_plus,
    random_tokens,
    sparsevlm_boundary,
    uniform,
    visionzip,
    visionzip_anchors,
)
from flashvlm_vllm.selection.config import VIDEO
from flashvlm_vllm.selection.flashvlm_2 import select_coherent
from flashvlm_vllm.selection.llm_attention import select_attended
from flashvlm_vllm.selection.neighbours import places_in_time
from flashvlm_vllm.selection.select import PUBLISHED, select_visual_tokens_ragged
from flashvlm_vllm.selection.selectors import GROUP, Merged, Selector, VisualTokens

LONGEST_NAME: Final = 64
"""Most bytes of a selector's name, which is sent to the worker with every image."""


_MANY: Final = 3072
"""Most tokens of a list of which all pairs are compared, which takes memory with the square and
time with the cube of their number (one second for 4,096 on a CPU core). Longer lists are compared
in blocks. The five crops of LLaVA-NeXT (2,880 tokens) and the paper's videos (2,048) are shorter.
"""


def _flashvlm(tokens: VisualTokens) -> Tensor:
    (kept,) = _flashvlm_many([tokens])
    return kept


def _flashvlm_many(images: Sequence[VisualTokens]) -> list[Tensor]:
    return _select_many(
        [(each.projected, each.saliency, each.text, each.budget, each.features) for each in images]
    )


def _select_many(
    images: Sequence[tuple[Tensor, Tensor, Tensor | None, int, Tensor]],
) -> list[Tensor]:
    kept: dict[int, Tensor] = {}
    for config, is_long in ((PUBLISHED, False), (VIDEO, True)):
        rows = [row for row, each in enumerate(images) if (len(each[0]) > _MANY) is is_long]
        if rows:
            columns = zip(*(images[row] for row in rows), strict=True)
            projected, saliency, text, budgets, features = map(list, columns)
            chosen = select_visual_tokens_ragged(
                projected, saliency, text, budgets, features, config
            )
            kept |= dict(zip(rows, chosen, strict=True))
    return [kept[row] for row in range(len(images))]


def _flashvlm_2(tokens: VisualTokens) -> Tensor:
    return select_coherent(
        tokens.projected,
        tokens.saliency,
        tokens.text,
        tokens.budget,
        tokens.features,
        places_in_time(tokens.places, tokens.times),
    )


def _llm_attention(tokens: VisualTokens) -> Tensor:
    if tokens.attention is None or not tokens.attention.words:
        return _flashvlm_2(tokens)
    return select_attended(
        tokens.attention.read,
        tokens.budget,
        tokens.features,
        places_in_time(tokens.places, tokens.times),
    )


def _vispruner(tokens: VisualTokens) -> Tensor:
    (kept,) = _vispruner_many([tokens])
    return kept


def _vispruner_many(images: Sequence[VisualTokens]) -> list[Tensor]:
    # Without a question FlashVLM is the same as VisPruner.
    return _select_many(
        [(each.features, each.saliency, None, each.budget, each.features) for each in images]
    )


def _visionzip(tokens: VisualTokens) -> Merged:
    keys = _keys(tokens).float().mean(dim=1)
    return Merged(
        visionzip(tokens.features, tokens.saliency, keys, tokens.budget),
        visionzip_anchors(tokens.saliency, tokens.budget),
    )


def _prumerge_plus(tokens: VisualTokens) -> Merged:
    # The published method uses attention and keys of the last layer, not split into heads. vLLM
    # builds the tower only up to the layer before it, so here both are from that layer.
    keys = _keys(tokens).flatten(1)
    return Merged(
        prumerge_plus(tokens.features, tokens.saliency, keys, tokens.budget),
        prumerge_anchors(tokens.saliency, tokens.budget),
    )


def _cdpruner(tokens: VisualTokens) -> Tensor:
    return cdpruner(tokens.projected, tokens.text, tokens.budget)


def _divprune(tokens: VisualTokens) -> Tensor:
    return divprune(tokens.projected, tokens.budget)


def _fastv(tokens: VisualTokens) -> Tensor:
    if tokens.attention is None:
        return _vispruner(tokens)
    return fastv_boundary(tokens.attention.mean, tokens.budget)


def _sparsevlm(tokens: VisualTokens) -> Tensor:
    if tokens.attention is None or tokens.text is None or not len(tokens.text):
        return _vispruner(tokens)
    return sparsevlm_boundary(tokens.attention.mean, tokens.projected, tokens.text, tokens.budget)


def _random(tokens: VisualTokens) -> Tensor:
    return random_tokens(len(tokens.projected), tokens.budget, tokens.seed)


def _uniform(tokens: VisualTokens) -> Tensor:
    return uniform(len(tokens.projected), tokens.budget)


def _keys(tokens: VisualTokens) -> Tensor:
    if tokens.keys is None:
        raise ValueError("this selector needs the keys of the tower's attention")
    return tokens.keys


BUILT_IN: Final[Mapping[str, Selector]] = MappingProxyType(
    {
        "flashvlm": Selector(_flashvlm, choose_many=_flashvlm_many),
        "flashvlm-2": Selector(_flashvlm_2),
        "llm-attention": Selector(_llm_attention, uses_llm=True, llm_checkerboard=True),
        "vispruner": Selector(_vispruner, uses_question=False, choose_many=_vispruner_many),
        "visionzip": Selector(_visionzip, merges=True, uses_question=False, uses_keys=True),
        "prumerge+": Selector(_prumerge_plus, merges=True, uses_question=False, uses_keys=True),
        "cdpruner": Selector(_cdpruner),
        "divprune": Selector(_divprune, uses_question=False),
        "fastv-boundary": Selector(_fastv, uses_llm=True),
        "sparsevlm-boundary": Selector(_sparsevlm, uses_llm=True),
        "random": Selector(_random, uses_question=False),
        "uniform": Selector(_uniform, uses_question=False),
    }
)
"""The built-in selectors, by the names used in requests."""


@functools.cache
def selectors() -> Mapping[str, Selector]:
    """Return all installed selectors, the built-in ones first.

    Raises:
        TypeError: an installed entry point is not a `Selector`.
        ValueError: its name is already used, or too long.

    """
    known = dict(BUILT_IN)
    for entry in entry_points(group=GROUP):
        if entry.name in known:
            raise ValueError(f"{GROUP}: two selectors are named {entry.name!r} ({entry.value})")
        if not 1 <= len(entry.name.encode()) <= LONGEST_NAME:
            raise ValueError(f"{GROUP}: {entry.name!r} has more than {LONGEST_NAME} bytes")
        selector = entry.load()
        if not isinstance(selector, Selector):
            raise TypeError(
                f"{GROUP}: {entry.name!r} ({entry.value}) is {type(selector).__name__}; allowed: "
                "a flashvlm_vllm.selection.Selector"
            )
        known[entry.name] = selector
    return MappingProxyType(known)


def find_selector(name: str) -> Selector:
    """Return a selector.

    Raises:
        ValueError: there is no selector with this name; the message lists the installed ones.

    """
    selector = selectors().get(name)
    if selector is None:
        shown = repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")
        raise ValueError(f"unknown selector {shown}; known: {', '.join(selectors())}")
    return selector
