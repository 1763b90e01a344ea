# SPDX-License-Identifier: Apache-2.0
"""How a video's budget is spent: over the whole clip, with a token of every time step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashvlm_vllm.request.budget import spread_budget
from flashvlm_vllm.selection import Selection, Selector, VisualTokens

Choose = Callable[[Sequence[VisualTokens]], list[Selection]]


def choose_of_clip(
    tokens: VisualTokens, frames: int, selector: Selector, choose: Choose
) -> Selection:
    """Select of a video.

    Of every time step the most salient token stays (the lower index of equals), so that no moment
    vanishes. What is left of the budget goes to the tokens that the selector chooses of all others
    together: a background that stands still is not paid for in every frame. A selector that
    merges tokens works frame by frame instead, as its paper has it, with equal shares.

    Args:
        tokens: ``frames * n`` of them, one time step after another; the budget is ``frames`` or
            more.
        frames: time steps.
        selector: the one that chooses.
        choose: runs it on some tokens.

    Returns:
        ``budget`` tokens; indices are ascending, so time runs forward.

    """
    if selector.merges:
        return _merge_by_frame(tokens, frames, choose)
    floor = first_of_each(tokens.saliency, frames)
    if tokens.budget == frames:
        return Selection(indices=floor)
    others = torch.ones_like(tokens.saliency, dtype=torch.bool)
    others[floor] = False
    # Sorting a mask has a known result size; nonzero would wait for the device.
    rest = others.int().argsort(descending=True, stable=True)[: len(others) - frames]
    (chosen,) = choose([_taken(tokens, rest, tokens.budget - frames)])
    if chosen.indices is None:
        raise TypeError("a selector that does not merge returned merged tokens")
    return Selection(indices=torch.cat([floor, rest[chosen.indices]]).sort().values)


def first_of_each(saliency: Tensor, frames: int) -> Tensor:
    """Return the number of the most salient token of each time step, ``(frames,)``, ascending.

    Args:
        saliency: ``(frames * n,)``; an entry that is not finite counts as the lowest.
        frames: time steps.

    """
    by_frame = saliency.view(frames, -1)
    by_frame = torch.where(by_frame.isfinite(), by_frame, -torch.inf)
    starts = torch.arange(frames, device=saliency.device) * by_frame.shape[1]
    # argmax may return any of several equals; the first of a stable sort is the lowest index.
    return by_frame.sort(dim=1, descending=True, stable=True).indices[:, 0] + starts


def _merge_by_frame(tokens: VisualTokens, frames: int, choose: Choose) -> Selection:
    count = len(tokens.projected) // frames
    shares = spread_budget(tokens.budget, [count] * frames)
    device = tokens.projected.device
    merged, anchors = [], []
    for frame, share in enumerate(shares):
        rows = torch.arange(frame * count, (frame + 1) * count, device=device)
        if share == count:
            merged.append(tokens.features[rows])
            anchors.append(rows)
            continue
        (selection,) = choose([_taken(tokens, rows, share)])
        if selection.merged is None:
            raise TypeError("a selector that merges returned indices")
        merged.append(selection.merged)
        anchors.append(rows[selection.spots])
    return Selection(merged=torch.cat(merged), anchors=torch.cat(anchors))


def _taken(tokens: VisualTokens, rows: Tensor, budget: int) -> VisualTokens:
    """Return some of the tokens, with a budget of their own."""
    return replace(
        tokens,
        budget=budget,
        projected=tokens.projected[rows],
        features=tokens.features[rows],
        saliency=tokens.saliency[rows],
        keys=None if tokens.keys is None else tokens.keys[rows],
        places=tokens.places[rows],
        times=None if tokens.times is None else tokens.times[rows],
    )
