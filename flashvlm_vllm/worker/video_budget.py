# SPDX-License-Identifier: Apache-2.0
"""Selection from a video: one budget for the whole video, and a token of every time step."""

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
    """Select from a video.

    The most salient token of every time step is kept (the lower index if equal), so that every time
    step has a token. For the rest of the budget the selector chooses from all other tokens of the
    video together, so a static background is not kept in every frame. A selector that merges tokens
    runs frame by frame with equal shares instead, as in its paper.

    Args:
        tokens: ``frames * n`` tokens, ordered by time step; the budget is at least ``frames``.
        frames: number of time steps.
        selector: the selector.
        choose: runs the selector on some tokens.

    Returns:
        ``budget`` tokens; indices are ascending, so they are in temporal order.

    """
    if selector.merges:
        return _merge_by_frame(tokens, frames, choose)
    floor = first_of_each(tokens.saliency, frames)
    if tokens.budget == frames:
        return Selection(indices=floor)
    others = torch.ones_like(tokens.saliency, dtype=torch.bool)
    others[floor] = False
    # Sorting a mask has a known result size; nonzero would synchronize with the device.
    rest = others.int().argsort(descending=True, stable=True)[: len(others) - frames]
    (chosen,) = choose([_taken(tokens, rest, tokens.budget - frames)])
    if chosen.indices is None:
        raise TypeError("a selector that does not merge returned merged tokens")
    return Selection(indices=torch.cat([floor, rest[chosen.indices]]).sort().values)


def first_of_each(saliency: Tensor, frames: int) -> Tensor:
    """Return the index of the most salient token of each time step, ``(frames,)``, ascending.

    Args:
        saliency: ``(frames * n,)``; an entry that is not finite counts as the lowest.
        frames: number of time steps.

    """
    by_frame = saliency.view(frames, -1)
    by_frame = torch.where(by_frame.isfinite(), by_frame, -torch.inf)
    starts = torch.arange(frames, device=saliency.device) * by_frame.shape[1]
    # argmax may return any of several equal entries; a stable sort puts the lowest index first.
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
    """Return the tokens in ``rows``, with another budget."""
    return replace(
        tokens,
        budget=budget,
        projected=tokens.projected[rows],
        features=tokens.features[rows],
        saliency=tokens.saliency[rows],
        keys=None if tokens.keys is None else tokens.keys[rows],
        places=tokens.places[rows],
        times=None if tokens.times is None else tokens.times[rows],
        attention=None if tokens.attention is None else tokens.attention.of(rows),
    )
