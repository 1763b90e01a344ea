# SPDX-License-Identifier: Apache-2.0
"""The selector interface, and the checks that apply to all selectors: count, order, values.

A selector gets the tokens of one image (or one crop of it) and either chooses which tokens are kept
or merges them into fewer. Other packages add selectors through the entry-point group `GROUP`; the
entry is a `Selector`:

    [project.entry-points."flashvlm.selectors"]
    brightest = "my_package:BRIGHTEST"
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor

GROUP: Final = "flashvlm.selectors"


class SelectorError(RuntimeError):
    """A selector raised or returned an invalid result; the message names the selector and why."""


@dataclass(frozen=True, slots=True)
class LanguageAttention:
    """Attention of a prompt's words to N visual tokens, in the second and third decoder layer.

    With `Selector.llm_checkerboard`, attention to every other token is 0.

    Its R rows are the words after the visual tokens: those of the question, then what the chat
    template writes up to the first generated token. The last row is FastV's (K = 2).
    """

    mean: Tensor
    """(R, N) float32: attention weights in the second layer, mean over the heads. A row sums to
    less than 1, because a word attends to other words, too."""
    read: Tensor
    """(2, R, N) float32: how much a word reads of a token in the second and third layer, where
    it attends more than the other words do. That is the attention weight times the length of the
    token's value vector, times the ratio of the weight to its mean over the R words; mean over the
    heads. Tokens that many words attend to without reading anything have short values, and a head
    that reads the same tokens for all words finds none. The visual tokens in the third layer are
    those after the first, and the words in the third have read these in the second."""
    words: int
    """Number of rows of the question's words, the first ones; 0 without a question."""

    def of(self, tokens: Tensor | slice) -> LanguageAttention:
        """Return the attention to some of the visual tokens."""
        return LanguageAttention(self.mean[:, tokens], self.read[:, :, tokens], self.words)


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """The tokens of one image or video, as input of a selector. All tensors are on one device."""

    budget: int
    """Tokens to return, 1 to N - 1. A selector is not called for an image that is kept whole."""
    projected: Tensor
    """(N, D) in the language model's space, raster order, any float dtype."""
    features: Tensor
    """(N, C) output of the vision tower, before the projector."""
    saliency: Tensor
    """(N,) float32: CLS attention in the layer whose output is `features`, mean over the heads;
    attention received from all tokens if the tower has no CLS."""
    text: Tensor | None
    """(L, D) raw input embeddings of the question's words; None without words, or if the selector
    does not use them (`uses_question`)."""
    keys: Tensor | None
    """(N, H, d) attention keys of that layer by head; None unless the selector uses them
    (`uses_keys`)."""
    places: Tensor
    """(N, 2) int64 row and column of each token in its image or crop; some rows and columns may
    have no token, because of padding."""
    seed: int
    """0 to 2^63 - 1; the same for the same image, budget, selector and question."""
    times: Tensor | None = None
    """(N,) int64 time step of each token, ascending; None for an image. One token of each time step
    of a video may be missing, because it is always kept and not part of the input."""
    attention: LanguageAttention | None = None
    """Attention of the question in the language model; None unless the selector uses it
    (`uses_llm`), and without a question."""


class Merged(NamedTuple):
    """Result of a selector that merges tokens."""

    features: Tensor
    """(budget, C) input of the projector, in the order of the language model's input if positions
    are consecutive."""
    anchors: Tensor
    """(budget,) int64 distinct: the token whose position each merged token gets if positions are
    kept. Features without anchors get evenly spaced positions, in their order."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A method to reduce N visual tokens to fewer."""

    choose: Callable[[VisualTokens], Tensor | Merged]
    """Returns (budget,) int64 distinct indices in any order; with `merges` a `Merged`, or its
    features alone."""
    merges: bool = False
    uses_question: bool = True
    """False: the selection does not depend on the question, so a second question about the same
    image hits the prefix cache."""
    uses_keys: bool = False
    uses_llm: bool = False
    """Whether the selector uses `VisualTokens.attention`, for which the first decoder layer runs on
    the item and on the question, and parts of the second and third."""
    llm_checkerboard: bool = False
    """With `uses_llm`: let only half of the visual tokens pass the first layer, a checkerboard.
    The products of linear layers are then six tenths; the attention to the others is 0."""
    choose_many: Callable[[Sequence[VisualTokens]], Sequence[Tensor | Merged]] | None = None
    """`choose` for several images at once, one result per image, if that is faster. The result for
    an image must not depend on the other images."""
    most_tokens: int | None = None
    """Most tokens of an image or video; a request with a budget for a larger one is refused. None:
    any number. If time or memory grow with the square of N, set the largest size that is still fast
    enough: one image of a client may have 16,384 tokens, a long video 32,768."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept tokens of one image: indices, or merged tokens and their anchors."""

    indices: Tensor | None = None
    """(T,) int64, ascending."""
    merged: Tensor | None = None
    """(T, C) tower features, before the projector."""
    anchors: Tensor | None = None
    """(T,) int64, distinct: the token whose position each merged token gets."""

    @property
    def spots(self) -> Tensor:
        """(T,) int64: the tokens whose positions these get, ascending unless merged."""
        spots = self.anchors if self.indices is None else self.indices
        assert spots is not None
        return spots

    def detached(self) -> Selection:
        """Return a copy. A view of a batch would keep the memory of the whole batch allocated."""
        return Selection(
            None if self.indices is None else self.indices.clone(),
            None if self.merged is None else self.merged.clone(),
            None if self.anchors is None else self.anchors.clone(),
        )


def run_selector(
    name: str, selector: Selector, tokens: VisualTokens, *, trusted: bool
) -> Selection:
    """Run a selector and check its result.

    Args:
        name: name of the selector, for messages.
        selector: the selector.
        tokens: its input.
        trusted: skip the checks of values, which would synchronize with the device.

    Raises:
        SelectorError: it raised, or its result has the wrong type, shape or values.

    """
    return _checked(name, selector, _answer(name, selector.choose, tokens), tokens, trusted)


def run_selector_many(
    name: str, selector: Selector, tokens: Sequence[VisualTokens], *, trusted: bool
) -> list[Selection]:
    """`run_selector` for several images: together if the selector supports it, else one by one.

    Args:
        name: name of the selector, for messages.
        selector: the selector.
        tokens: its inputs, one per image.
        trusted: skip the checks of values, which would synchronize with the device.

    Returns:
        One selection per image.

    Raises:
        SelectorError: it raised, or a result is not valid. Use `run_selector` for each image to
            find out which one failed.

    """
    if selector.choose_many is None:
        return [run_selector(name, selector, each, trusted=trusted) for each in tokens]
    answers = _answer(name, selector.choose_many, tokens)
    if not isinstance(answers, Sequence) or len(answers) != len(tokens):
        raise SelectorError(
            f"{name} returned {type(answers).__name__} for {len(tokens)} images; allowed: a "
            "sequence of one tensor per image"
        )
    return [
        _checked(name, selector, answer, each, trusted)
        for answer, each in zip(answers, tokens, strict=True)
    ]


def stand_in(selector: Selector, tokens: VisualTokens) -> Selection:
    """Return evenly spaced tokens for an image whose selector failed, in the selector's form.

    The request ends with an error, but the engine needs tokens to continue.
    """
    indices = _evenly_spaced(tokens)
    if selector.merges:
        return Selection(merged=tokens.features[indices], anchors=indices)
    return Selection(indices=indices)


def _evenly_spaced(tokens: VisualTokens) -> Tensor:
    """Return `budget` indices, (T,) int64, created on the device to avoid a copy."""
    count = len(tokens.projected)
    numbers = torch.arange(tokens.budget, device=tokens.projected.device)
    return (2 * numbers + 1) * count // (2 * tokens.budget)


Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


def _answer(name: str, choose: Callable[[Asked], Answer], asked: Asked) -> Answer:
    try:
        with torch.no_grad():
            return choose(asked)
    # No exception of another package's code may end the engine.
    except Exception as error:
        # Not str(error), which may itself raise.
        message = "".join(traceback.format_exception_only(error)).strip()
        raise SelectorError(f"{name} raised {message}") from error


def _checked(
    name: str,
    selector: Selector,
    answer: Tensor | Merged,
    tokens: VisualTokens,
    trusted: bool,
) -> Selection:
    anchors: Tensor | None = None
    if selector.merges and isinstance(answer, tuple) and len(answer) == 2:
        answer, anchors = answer
    if not isinstance(answer, Tensor):
        raise SelectorError(f"{name} returned {type(answer).__name__}; allowed: a tensor")
    # A selector may return tensors on another device, such as a random permutation on the CPU.
    answer = answer.to(tokens.projected.device)
    if selector.merges:
        features = _checked_features(name, answer, tokens, trusted)
        return Selection(merged=features, anchors=_anchors(name, anchors, tokens, trusted))
    return Selection(indices=_checked_indices(name, answer, tokens, trusted))


def _anchors(name: str, given: Tensor | None, tokens: VisualTokens, trusted: bool) -> Tensor:
    """Return the anchors of merged tokens: those of the selector, or evenly spaced ones."""
    if given is None:
        return _evenly_spaced(tokens)
    if not isinstance(given, Tensor):
        raise SelectorError(f"{name} returned {type(given).__name__} as anchors; allowed: a tensor")
    given = given.to(tokens.projected.device)
    _checked_indices(name, given, tokens, trusted)
    return given


def _checked_indices(name: str, answer: Tensor, tokens: VisualTokens, trusted: bool) -> Tensor:
    budget, count = tokens.budget, len(tokens.projected)
    if answer.dtype != torch.int64 or tuple(answer.shape) != (budget,):
        raise SelectorError(
            f"{name} returned {answer.dtype} {tuple(answer.shape)}; allowed: torch.int64 "
            f"({budget},), one index per token to keep"
        )
    ascending = torch.sort(answer).values
    if not trusted:
        in_range = (ascending[0] >= 0) & (ascending[-1] < count)
        if not bool(in_range & (ascending[1:] > ascending[:-1]).all()):
            raise SelectorError(
                f"{name} returned indices that repeat or lie outside 0 to {count - 1}"
            )
    return ascending


def _checked_features(name: str, answer: Tensor, tokens: VisualTokens, trusted: bool) -> Tensor:
    wanted = (tokens.budget, tokens.features.shape[1])
    if not answer.is_floating_point() or tuple(answer.shape) != wanted:
        raise SelectorError(
            f"{name} returned {answer.dtype} {tuple(answer.shape)}; allowed: a floating-point "
            f"tensor {wanted}, one row of tower features per token"
        )
    if not trusted and not bool(torch.isfinite(answer).all()):
        raise SelectorError(f"{name} returned features that are not finite")
    return answer.to(tokens.features.dtype)
