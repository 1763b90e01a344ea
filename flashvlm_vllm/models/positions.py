# SPDX-License-Identifier: Apache-2.0
"""M-RoPE positions of pruned images and videos, exact as integers.

Which tokens stay is known only after the encoder ran, positions are asked for before. But text
around an item stands where it stands without pruning, whatever is kept of the item: the base of
an item and everything behind it follow from its whole grid. Only the kept tokens' own positions
must wait, and they travel with their embeddings, through vLLM's protocol for models that prune
(`SupportsMultiModalPruning`), which both of its model runners speak.

They travel as digits to the base 256 in channels of their own. vLLM's models write the position
itself into a channel of the embedding's type, and bfloat16 has no 257.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BASE = 256
"""Digits from 0 to 255 are exact in bfloat16, float16 and float32."""
_DIGITS = 3
"""Enough for 16 million; more than any context is long."""
_NUMBERS = 5
"""Rank in the item plus one (0: positions are known without), lead, and time, row, column."""
CHANNELS = _NUMBERS * _DIGITS
"""Trailing channels of every embedding of a model whose kept tokens keep their positions."""


@dataclass(frozen=True)
class Span:
    """An image or video in a prompt."""

    offset: int
    """Index of its first placeholder."""
    length: int
    """Placeholders; fewer than its grid has tokens when it is pruned."""
    grid: NDArray[np.int64]
    """``(N, 3)`` time, row and column of each token without pruning, from 0; text that stands
    between its visual tokens included."""


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


def prompt_positions(tokens: int, spans: Iterable[Span]) -> tuple[Tensor, int]:
    """Return the positions of a prompt, ``(3, tokens)`` int64, and by how much they run ahead.

    Text is where it is without pruning; the placeholders of a pruned item are at its base until
    `written` puts its kept tokens where they belong.
    """
    positions = np.empty((3, tokens), dtype=np.int64)
    index, position = 0, 0
    for span in spans:
        text = span.offset - index
        positions[:, index : span.offset] = np.arange(position, position + text)
        position += text
        end = span.offset + span.length
        is_whole = span.length == len(span.grid)
        positions[:, span.offset : end] = position + (span.grid.T if is_whole else 0)
        position += int(span.grid.max()) + 1
        index = end
    positions[:, index:] = np.arange(position, position + tokens - index)
    position += tokens - index
    return torch.from_numpy(positions), position - tokens


def with_positions(embeddings: Tensor, positions: Tensor, lead: int = 0) -> Tensor:
    """Append to a pruned item's embeddings where they belong.

    Args:
        embeddings: ``(T, D)``, any float dtype.
        positions: ``(T, 3)`` int64 time, row and column from the item's base.
        lead: text tokens of the item before the first id that stands for a visual token.

    Returns:
        ``(T, D + CHANNELS)``.

    """
    ranks = torch.arange(1, len(positions) + 1, device=positions.device)
    leads = torch.full_like(ranks, lead)
    numbers = torch.cat([ranks[:, None], leads[:, None], positions], dim=1)
    places = _BASE ** torch.arange(_DIGITS, device=numbers.device)
    digits = numbers[..., None] // places % _BASE
    return torch.cat([embeddings, digits.flatten(1).to(embeddings)], dim=1)


def without_positions(embeddings: Tensor) -> Tensor:
    """Append to an unpruned item's embeddings that nothing has to be written."""
    return torch.nn.functional.pad(embeddings, (0, CHANNELS))


def written(
    input_ids: Tensor,
    placeholders: Sequence[int],
    embeddings: Sequence[Tensor],
    positions: Tensor,
    computed: int,
) -> Tensor:
    """Return a prompt's positions with those of some kept tokens written in.

    Writing again changes nothing, so it does not matter how often a preempted request, or a
    drafter that looks one token ahead, comes by.

    Args:
        input_ids: ``(N,)`` of the prompt.
        placeholders: ids that stand for visual tokens. Text comes before and after a pruned item.
        embeddings: ``(n_i, D + CHANNELS)`` of the items, or of the parts of items, that are
            computed now, in the order of the prompt.
        positions: ``(3, N)`` integers.
        computed: how many tokens of the prompt were computed before.

    """
    numbers = [_numbers(each[:, -CHANNELS:], positions.device) for each in embeddings]
    if not any(bool(each[0, 0]) for each in numbers if len(each)):
        return positions
    positions = positions.clone()
    is_visual = torch.isin(input_ids, torch.tensor(placeholders, device=input_ids.device))
    is_visual = is_visual.to(positions.device)
    is_first = is_visual.clone()
    is_first[1:] &= ~is_visual[:-1]
    starts, visual = is_first.nonzero().flatten(), is_visual.nonzero().flatten()
    index = computed
    for each in numbers:
        if not len(each):
            continue
        at_hand = torch.tensor(index, device=positions.device)
        rank, lead = each[:, 0] - 1, int(each[0, 1])
        first_rank = int(rank[0])
        if first_rank < 0:
            last = int(torch.searchsorted(visual, at_hand)) + len(each) - 1
            index = int(visual[last]) + 1
            continue
        if first_rank == 0:
            start = int(starts[torch.searchsorted(starts, at_hand)]) - lead
        else:
            # The part begins at what is computed now; a drafter's, one token behind.
            start = computed - first_rank
            start += 0 if is_first[start + lead] else 1
        base = int(positions[:, start - 1].max()) + 1 if start else 0
        positions[:, start + rank] = (each[:, 2:].T + base).to(positions.dtype)
        index = start + int(rank[-1]) + 1
    return positions


def _numbers(channels: Tensor, device: torch.device) -> Tensor:
    """Read ``(n, 5)`` int64 back from digits."""
    digits = channels.to(device).long().unflatten(1, (_NUMBERS, _DIGITS))
    numbers: Tensor = (digits * _BASE ** torch.arange(_DIGITS, device=device)).sum(dim=-1)
    return numbers


def has_text_around(offset: int, length: int, tokens: int, others: Sequence[Any]) -> bool:
    """Tell whether a pruned item has text right behind it, and no item right before it.

    Its base is the position of the token before, which must not be a kept token itself; and a
    prompt that ends with it would not tell how far the whole item reaches.

    Args:
        offset: of its first placeholder.
        length: in placeholders.
        tokens: of the prompt.
        others: the prompt's other items, with ``offset`` and ``length``.

    """
    end = offset + length
    touches = any(other.offset == end or other.offset + other.length == offset for other in others)
    return end < tokens and not touches
