# SPDX-License-Identifier: Apache-2.0
"""What a selector is, and everything that no selector may differ on: count, order, guards.

A selector looks at one image (or one crop of it) and either chooses which tokens stay or merges
them into fewer. Third parties add theirs through the entry-point group `GROUP`; the entry is a
`Selector`:

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
    """A selector raised, or returned what cannot be used; the message names it and says how."""


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One image's or video's tokens as a selector sees them. All tensors are on one device."""

    budget: int
    """Tokens to return, 1 to N - 1: an image that stays whole is never shown to a selector."""
    projected: Tensor
    """(N, D) in the language model's space, raster order, any float dtype."""
    features: Tensor
    """(N, C) out of the vision tower, before the projector."""
    saliency: Tensor
    """(N,) float32: CLS attention in the layer that `features` leave, mean over the heads;
    attention received from all tokens where the tower has no CLS."""
    text: Tensor | None
    """(L, D) raw input embeddings of the question's words; None without words, and for a
    selector that says it does not use them."""
    keys: Tensor | None
    """(N, H, d) keys of that layer by head; None unless the selector asks for them."""
    places: Tensor
    """(N, 2) int64 row and column of each token in its image, or in its crop of one; some places
    may be empty, where padding was."""
    seed: int
    """0 to 2^63 - 1, the same whenever the same image is selected from with the same wishes."""
    times: Tensor | None = None
    """(N,) int64 time step of each token, ascending; None for an image. Some tokens of a video
    may be missing: one of each time step is kept in any case and not shown."""


class Merged(NamedTuple):
    """What a selector that merges makes of an image."""

    features: Tensor
    """(budget, C) for the projector, in the order in which the language model shall see them where
    places close up."""
    anchors: Tensor
    """(budget,) int64 distinct: the token that each is gathered around. Where places are kept, it
    stands there. Features without anchors stand at even distances, in their order."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A named way from N visual tokens to fewer."""

    choose: Callable[[VisualTokens], Tensor | Merged]
    """Returns (budget,) int64 distinct indices in any order, or with `merges` what it merged: a
    `Merged`, or its features alone."""
    merges: bool = False
    uses_question: bool = True
    """False: the same tokens whatever is asked, so a second question about the same image hits
    the prefix cache."""
    uses_keys: bool = False
    choose_many: Callable[[Sequence[VisualTokens]], Sequence[Tensor | Merged]] | None = None
    """`choose` for several images at once, one answer per image, where that is faster. The
    answer for an image must not depend on the others."""
    most_tokens: int | None = None
    """Most tokens of an image or video that it takes; a budget for a larger one is refused when it
    arrives. None: any number. Where time or memory grow with the square of N, set the size that
    is still served in time: one item of a client may have 16,384 tokens, a long video 32,768."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What stays of one image: indices, or what was merged and where it belongs."""

    indices: Tensor | None = None
    """(T,) int64, ascending."""
    merged: Tensor | None = None
    """(T, C) in the tower's space; the projector comes after."""
    anchors: Tensor | None = None
    """(T,) int64, distinct: the token that each merged one is gathered around."""

    @property
    def spots(self) -> Tensor:
        """(T,) int64: the tokens whose places these take, ascending unless merged."""
        spots = self.anchors if self.indices is None else self.indices
        assert spots is not None
        return spots

    def detached(self) -> Selection:
        """Return a copy that keeps nothing else alive: those of a batch may be views of one."""
        return Selection(
            None if self.indices is None else self.indices.clone(),
            None if self.merged is None else self.merged.clone(),
            None if self.anchors is None else self.anchors.clone(),
        )


def run_selector(
    name: str, selector: Selector, tokens: VisualTokens, *, trusted: bool
) -> Selection:
    """Let a selector choose and hold it to the contract.

    Args:
        name: of the selector, for messages.
        selector: any.
        tokens: what it chooses from.
        trusted: leaves out the checks of values, which would wait for the device.

    Raises:
        SelectorError: it raised, or its answer has the wrong type, shape or values.

    """
    return _checked(name, selector, _answer(name, selector.choose, tokens), tokens, trusted)


def run_selector_many(
    name: str, selector: Selector, tokens: Sequence[VisualTokens], *, trusted: bool
) -> list[Selection]:
    """`run_selector` for several images: together where the selector can, one by one otherwise.

    Args:
        name: of the selector, for messages.
        selector: any.
        tokens: what it chooses from, one entry per image.
        trusted: leaves out the checks of values, which would wait for the device.

    Returns:
        One selection per image.

    Raises:
        SelectorError: it raised, or an answer cannot be used. `run_selector` tells, image by
            image, whose fault it is.

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
    """Return evenly spaced tokens for an image whose selector failed, in the form it would have.

    Its request ends in an error; the engine needs some tokens all the same.
    """
    indices = _evenly_spaced(tokens)
    if selector.merges:
        return Selection(merged=tokens.features[indices], anchors=indices)
    return Selection(indices=indices)


def _evenly_spaced(tokens: VisualTokens) -> Tensor:
    """Return as many indices as the budget, (T,) int64. Made on the device, so nothing waits."""
    count = len(tokens.projected)
    numbers = torch.arange(tokens.budget, device=tokens.projected.device)
    return (2 * numbers + 1) * count // (2 * tokens.budget)


Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


def _answer(name: str, choose: Callable[[Asked], Answer], asked: Asked) -> Answer:
    try:
        with torch.no_grad():
            return choose(asked)
    # Whatever a stranger's code raises must not end the engine.
    except Exception as error:
        # Not str(error): an exception may fail even at that.
        said = "".join(traceback.format_exception_only(error)).strip()
        raise SelectorError(f"{name} raised {said}") from error


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
    # Wherever a selector worked: a random permutation, say, is drawn on the host.
    answer = answer.to(tokens.projected.device)
    if selector.merges:
        features = _checked_features(name, answer, tokens, trusted)
        return Selection(merged=features, anchors=_anchors(name, anchors, tokens, trusted))
    return Selection(indices=_checked_indices(name, answer, tokens, trusted))


def _anchors(name: str, given: Tensor | None, tokens: VisualTokens, trusted: bool) -> Tensor:
    """Return where merged tokens belong: as the selector says, or at even distances."""
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
