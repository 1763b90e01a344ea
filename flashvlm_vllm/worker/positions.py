# SPDX-License-Identifier: Apache-2.0
"""Positions of pruned images and videos, exact as integers: rotary embeddings of one or three axes.

Which tokens stay is known only after the encoder ran, positions are asked for before. But text
around an item stands where it stands without pruning, whatever is kept of the item: the base of
an item and everything behind it follow from its whole layout. Only the kept tokens' own positions
must wait, and they travel with their embeddings, through vLLM's protocol for models that prune
(`SupportsMultiModalPruning`), which both of its model runners speak.

Until then the placeholders of kept tokens are open: their first channel holds ``-1 - base``, the
second the base and the positions that stay free in the item (with three axes: all that the item
has). So nothing is read off neighbours,
and an item may be the first or the last in its prompt, or stand beside another.

Kept tokens' places travel as digits to the base 256 in channels of their own. vLLM's models write
the position itself into a channel of the embedding's type, and bfloat16 has no 257.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashvlm_vllm.position_scheme import AXES, LINE_CHANNELS

_BASE = 256
"""Digits from 0 to 255 are exact in bfloat16, float16 and float32."""
_DIGITS = 3
"""Enough for 16 million; more than any context is long."""
_OWN = 2
"""Number among the item's kept tokens, from 1 (0: nothing has to be written), and gap; see
`with_places`. The places follow, one for each axis."""
_START = "_flashvlm_start"


def channels(axes: int) -> int:
    """Count the trailing channels of embeddings whose places travel with them."""
    return (_OWN + axes) * _DIGITS


@dataclass(frozen=True)
class Span:
    """An image or video in a prompt, and how its unpruned layout continues the prompt's."""

    offset: int
    """Index of its first placeholder."""
    places: NDArray[np.int64]
    """``(n, axes)`` of each placeholder from the item's base; an open one's place is added."""
    extent: int
    """By how much text behind the item is ahead of its base."""
    free: int = 0
    """Positions of a pruned item that stay free; with three axes it is not needed."""
    is_open: NDArray[np.bool_] | None = None
    """``(n,)`` which placeholders wait for the worker; ``None``: no one does."""

    @classmethod
    def of_grid(cls, offset: int, length: int, grid: NDArray[np.int64]) -> Self:
        """Make one of all positions of an item, ``(N, axes)``, of which ``length`` are left."""
        extent = int(grid.max()) + 1
        if length == len(grid):
            return cls(offset, grid, extent)
        places = np.zeros((length, grid.shape[1]), dtype=np.int64)
        return cls(offset, places, extent, is_open=np.ones(length, dtype=np.bool_))


def grid_positions(steps: int, rows: int, columns: int, factor: float = 1.0) -> NDArray[np.int64]:
    """Return time, row and column of each token of a grid, ``(steps * rows * columns, 3)``.

    Args:
        steps: time steps, 1 for an image.
        rows: of tokens.
        columns: of tokens.
        factor: positions per time step; products are cut to integers, as the models do.

    """
    positions = np.indices((steps, rows, columns)).reshape(3, -1).T.astype(np.int64)
    if factor != 1.0:
        positions[:, 0] = (positions[:, 0] * factor).astype(np.int64)
    return positions


def prompt_positions(
    tokens: int, spans: Iterable[Span], axes: int = AXES, furthest: int | None = None
) -> tuple[Tensor, int]:
    """Return the positions of a prompt and by how much they run ahead of its tokens.

    Text is where it is without pruning; open placeholders wait for `write`. With three axes, an
    item that would bring the positions further ahead than ``furthest`` is scaled down to what is
    left, from the first pruned item on. That depends on nothing behind the item, so prompts that
    begin alike share their KV blocks.

    Args:
        tokens: of the prompt.
        spans: its items, in order; those that are laid out as text may be left out.
        axes: 1 or 3.
        furthest: with three axes, how far positions may run ahead; ``None``: however far.

    Returns:
        ``(LINE_CHANNELS, tokens)`` or ``(3, tokens)`` int64, and the difference.

    """
    rows = LINE_CHANNELS if axes == 1 else axes
    positions = np.empty((rows, tokens), dtype=np.int64)
    numbers = np.zeros(tokens, dtype=np.int64)
    index, position, is_pruned = 0, 0, False
    for span in spans:
        text = span.offset - index
        positions[:, index : span.offset] = np.arange(position, position + text)
        position += text
        index = span.offset + len(span.places)
        is_pruned = is_pruned or span.is_open is not None
        extent, places = span.extent, span.places
        if axes == AXES and is_pruned and furthest is not None:
            extent = max(1, min(extent, index + furthest - position))
            places = places * extent // span.extent
        own = positions[:, span.offset : index]
        own[:] = position + places.T
        if span.is_open is not None:
            bases = own[0, span.is_open]
            own[0, span.is_open] = -1 - bases
            own[1, span.is_open] = bases + (extent if axes == AXES else span.free)
            numbers[span.offset : index][span.is_open] = np.arange(1, len(bases) + 1)
        position += extent
    positions[:, index:] = np.arange(position, position + tokens - index)
    position += tokens - index
    result = torch.from_numpy(positions)
    # The first model runner keeps this very tensor and writes into it. It asks again, for its
    # drafter and after a preemption: what was open at the start must be known then.
    start = result.clone() if is_pruned else None
    setattr(result, _START, (start, torch.from_numpy(numbers), position - tokens))
    return result, position - tokens


def ahead_of(positions: Tensor) -> int | None:
    """Return by how much a prompt's positions run ahead of its tokens; ``None`` of a copy."""
    start = getattr(positions, _START, None)
    return None if start is None else start[2]


def with_places(embeddings: Tensor, places: Tensor, gap: int = 0) -> Tensor:
    """Append to a pruned item's embeddings where they belong.

    Args:
        embeddings: ``(T, D)``, any float dtype.
        places: ``(T, axes)`` int64 without pruning. With one axis, ascending, and text tokens
            that have no embedding of the item are not counted.
        gap: what may be shortened: with one axis the positions that dropped tokens keep free, with
            three the item's extent.

    Returns:
        ``(T, D + channels(axes))``.

    """
    device = places.device
    ranks = torch.arange(1, len(places) + 1, device=device)
    numbers = torch.cat([ranks[:, None], torch.full_like(ranks, gap)[:, None], places], dim=1)
    digits = numbers[..., None] // _powers(device) % _BASE
    return torch.cat([embeddings, digits.flatten(1).to(embeddings)], dim=1)


def without_places(embeddings: Tensor, axes: int = AXES) -> Tensor:
    """Append to an unpruned item's embeddings that nothing has to be written."""
    return torch.nn.functional.pad(embeddings, (0, channels(axes)))


def write(embeddings: Sequence[Tensor], positions: Tensor, computed: int, axes: int = AXES) -> int:
    """Write the positions of some kept tokens. Writing again changes nothing.

    Args:
        embeddings: ``(n_i, D + channels(axes))`` of the items, or of the parts of items, that are
            computed now, in the order of the prompt; those without places are left out.
        positions: as of `prompt_positions`, or a copy; written into.
        computed: how many tokens of the prompt were computed before.
        axes: as of `prompt_positions`.

    Returns:
        by how much the prompt's positions run ahead of its tokens.

    """
    start, order, ahead = getattr(positions, _START, (positions, None, None))
    if start is None or (ahead is not None and not embeddings):
        return int(ahead or 0)
    is_open = start[0] < 0
    end = int(start[1, -1] if is_open[-1] else start[:, -1].max() + 1)
    numbers = [_numbers(each, positions.device, axes) for each in embeddings if len(each)]
    numbers = [each for each in numbers if int(each[0, 0])]
    if numbers:
        together = torch.cat(numbers)
        waiting = is_open.nonzero().flatten()
        first = int(torch.searchsorted(waiting, computed))
        if order is not None and first < len(waiting):
            # The first runner's drafter begins a token later.
            first += int(order[waiting[first]]) != int(together[0, 0])
        indices = waiting[first : first + len(together)]
        base, free = -1 - start[0, indices].long(), start[1, indices].long()
        own = together[: len(indices)]
        positions[:, indices] = (base + _shortened(own, free - base)).to(positions.dtype)
        if axes == 1 and is_open[-1]:
            # The item ends here, and its last token has the number of all of them.
            end += int(together[-1, 0])
    return end - positions.shape[1] if ahead is None else int(ahead)


def _shortened(numbers: Tensor, free: Tensor) -> Tensor:
    """Return places, ``(axes, n)``, where an item has fewer positions than without pruning.

    With three axes all of its places are scaled, with one axis the gaps between them.

    Args:
        numbers: ``(n, _OWN + axes)`` as of `_numbers`.
        free: ``(n,)``.

    """
    gap, places = numbers[:, 1], numbers[:, _OWN:].T
    before = numbers[:, 0] - 1 if len(places) == 1 else 0
    shorter = before + (places - before) * free // gap.clamp(min=1)
    return torch.where(gap > 0, shorter, places)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([_BASE**digit for digit in range(_DIGITS)], device=device)


def _numbers(embeddings: Tensor, device: torch.device, axes: int) -> Tensor:
    """Read ``(n, _OWN + axes)`` int64 back from digits."""
    digits = embeddings[:, -channels(axes) :].to(device).long()
    digits = digits.unflatten(1, (_OWN + axes, _DIGITS))
    numbers: Tensor = (digits * _powers(device)).sum(dim=-1)
    return numbers
