# SPDX-License-Identifier: Apache-2.0
"""Positions of pruned images and videos, exact as integers: rotary embeddings of one or three axes.

The runner needs positions before the encoder runs, but which tokens are kept is known only
afterwards. Text around an item has the same positions as without pruning, whichever tokens are
kept: the base of an item and all positions after it depend only on its whole layout. Only the
positions of kept tokens have to wait. They are sent with the embeddings, through vLLM's protocol
for models that prune (`SupportsMultiModalPruning`), which both model runners support.

Until then the placeholders of kept tokens are open: the first channel holds ``-1 - base``, the
second the base plus the number of unused positions in the item (with three axes: plus the item's
extent). An open position does not depend on adjacent tokens, so an item may be the first or the
last in its prompt, or follow another directly.

Positions are sent as base-256 digits in channels appended to the embeddings. vLLM's models write
the position itself into a channel of the embedding's dtype, but bfloat16 cannot represent 257.
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
"""Enough for positions up to 16 million, more than any model's context."""
_OWN = 2
"""Numbers before the places: the token's number among the item's kept tokens, from 1 (0: nothing to
write), and the gap; see `with_places`. One place per axis follows."""
_START = "_flashvlm_start"


def channels(axes: int) -> int:
    """Return the number of position channels that are appended to embeddings."""
    return (_OWN + axes) * _DIGITS


@dataclass(frozen=True)
class Span:
    """An image or video in a prompt, and the positions of its unpruned layout."""

    offset: int
    """Index of its first placeholder token."""
    places: NDArray[np.int64]
    """``(n, axes)`` position of each placeholder relative to the item's base; 0 for an open one."""
    extent: int
    """Position of the text after the item, relative to the item's base."""
    free: int = 0
    """With one axis: number of positions that a pruned item leaves unused."""
    is_open: NDArray[np.bool_] | None = None
    """``(n,)`` which placeholders are open; ``None``: none of them."""

    @classmethod
    def of_grid(cls, offset: int, length: int, grid: NDArray[np.int64]) -> Self:
        """Create a span with ``length`` open placeholders from all positions of an item.

        Args:
            offset: index of its first placeholder token.
            length: number of placeholder tokens.
            grid: ``(N, axes)`` positions of the unpruned item.

        """
        extent = int(grid.max()) + 1
        if length == len(grid):
            return cls(offset, grid, extent)
        places = np.zeros((length, grid.shape[1]), dtype=np.int64)
        return cls(offset, places, extent, is_open=np.ones(length, dtype=np.bool_))


def grid_positions(steps: int, rows: int, columns: int, factor: float = 1.0) -> NDArray[np.int64]:
    """Return the M-RoPE position of each token of a grid, ``(steps * rows * columns, 3)``.

    Args:
        steps: number of time steps, 1 for an image.
        rows: number of rows of tokens.
        columns: number of columns of tokens.
        factor: positions per time step; products are truncated to integers, as in the models.

    """
    positions = np.indices((steps, rows, columns)).reshape(3, -1).T.astype(np.int64)
    if factor != 1.0:
        positions[:, 0] = (positions[:, 0] * factor).astype(np.int64)
    return positions


def prompt_positions(
    tokens: int, spans: Iterable[Span], axes: int = AXES, furthest: int | None = None
) -> tuple[Tensor, int]:
    """Return the positions of a prompt, and how far they are ahead of token indices at its end.

    Text has the positions it has without pruning; open placeholders are filled in by `write`. With
    three axes, from the first pruned item on, an item that would move positions further ahead than
    ``furthest`` is scaled down. The scale depends only on what comes before, so prompts with the
    same beginning share their KV blocks.

    Args:
        tokens: number of tokens in the prompt.
        spans: items in prompt order; items laid out like text may be left out.
        axes: 1 or 3.
        furthest: with three axes, how far positions may be ahead; ``None``: no limit.

    Returns:
        Positions, ``(LINE_CHANNELS, tokens)`` or ``(3, tokens)`` int64, and the difference.

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
    # The V1 model runner stores this tensor and writes into it. It calls `write` again for its
    # drafter and after a preemption, so the open placeholders must still be known then.
    start = result.clone() if is_pruned else None
    setattr(result, _START, (start, torch.from_numpy(numbers), position - tokens))
    return result, position - tokens


def ahead_of(positions: Tensor) -> int | None:
    """Return how far a prompt's positions are ahead of token indices; ``None`` for a copy."""
    start = getattr(positions, _START, None)
    return None if start is None else start[2]


def final(positions: Tensor, ahead: int) -> tuple[Tensor, int]:
    """Mark a prompt's positions, ``(channels, N)``, as final: no placeholder is open.

    Args:
        positions: the positions.
        ahead: how far they are ahead of token indices at its end.

    """
    setattr(positions, _START, (None, None, ahead))
    return positions, ahead


def with_places(embeddings: Tensor, places: Tensor, gap: int = 0) -> Tensor:
    """Append position channels to a pruned item's embeddings.

    Args:
        embeddings: ``(T, D)``, any float dtype.
        places: ``(T, axes)`` int64 positions without pruning, relative to the item's base. With one
            axis ascending; text tokens without an embedding of the item are not counted.
        gap: with one axis the positions that dropped tokens leave unused, with three the item's
            extent. It may be shortened later.

    Returns:
        ``(T, D + channels(axes))``.

    """
    device = places.device
    ranks = torch.arange(1, len(places) + 1, device=device)
    numbers = torch.cat([ranks[:, None], torch.full_like(ranks, gap)[:, None], places], dim=1)
    digits = numbers[..., None] // _powers(device) % _BASE
    return torch.cat([embeddings, digits.flatten(1).to(embeddings)], dim=1)


def without_places(embeddings: Tensor, axes: int = AXES) -> Tensor:
    """Append position channels to an unpruned item's embeddings that mean "nothing to write"."""
    return torch.nn.functional.pad(embeddings, (0, channels(axes)))


def write(embeddings: Sequence[Tensor], positions: Tensor, computed: int, axes: int = AXES) -> int:
    """Fill in the positions of some kept tokens. Calling it again has no effect.

    Args:
        embeddings: ``(n_i, D + channels(axes))`` of the items, or parts of items, that are computed
            in this step, in prompt order; those without positions to write are left out.
        positions: result of `prompt_positions`, or a copy; modified in place.
        computed: number of tokens of the prompt that were computed before this step.
        axes: as in `prompt_positions`.

    Returns:
        How far the prompt's positions are ahead of token indices at its end.

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
            # The drafter of the V1 model runner starts one token later.
            first += int(order[waiting[first]]) != int(together[0, 0])
        indices = waiting[first : first + len(together)]
        base, free = -1 - start[0, indices].long(), start[1, indices].long()
        own = together[: len(indices)]
        positions[:, indices] = (base + _shortened(own, free - base)).to(positions.dtype)
        if axes == 1 and is_open[-1]:
            # The item ends here; its last token has the highest number.
            end += int(together[-1, 0])
    return end - positions.shape[1] if ahead is None else int(ahead)


def _shortened(numbers: Tensor, free: Tensor) -> Tensor:
    """Return places, ``(axes, n)``, in an item whose gap or extent is shortened to ``free``.

    With three axes all places are scaled, with one axis the gaps between them.

    Args:
        numbers: ``(n, _OWN + axes)``, result of `_numbers`.
        free: ``(n,)`` shortened gap (one axis) or extent (three axes).

    """
    gap, places = numbers[:, 1], numbers[:, _OWN:].T
    before = numbers[:, 0] - 1 if len(places) == 1 else 0
    shorter = before + (places - before) * free // gap.clamp(min=1)
    return torch.where(gap > 0, shorter, places)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([_BASE**digit for digit in range(_DIGITS)], device=device)


def _numbers(embeddings: Tensor, device: torch.device, axes: int) -> Tensor:
    """Decode the position channels to ``(n, _OWN + axes)`` int64."""
    digits = embeddings[:, -channels(axes) :].to(device).long()
    digits = digits.unflatten(1, (_OWN + axes, _DIGITS))
    numbers: Tensor = (digits * _powers(device)).sum(dim=-1)
    return numbers
