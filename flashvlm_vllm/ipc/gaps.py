# SPDX-License-Identifier: Apache-2.0
"""How many positions the dropped tokens of a prompt keep free, where those are few.

Where places are kept, a prompt of ``n`` tokens of which ``gap`` were dropped ends at position
``n + gap``, and its answer goes on from there. A rotary table has an end. Up to it the gaps stay as
they are; a prompt and an answer that would pass it have all gaps shortened in proportion:

    position = index in the pruned prompt + floor(dropped before it * allowed / gap)

So order is kept strictly, tokens that were neighbours stay neighbours, and without a gap left the
places close up. How much is allowed depends on the numbers of `allowed_gap` alone, and it is part
of the identity of every pruned item, so that KV blocks of two layouts never meet.

Pure functions; the API process and the worker share them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_PREFIX = "flashvlm-"
_CLOSED = "closed"
_NAME = re.compile(rf"{_PREFIX}(\d+)-\d+-[0-9a-f]{{64}}[^~]*(?:~(\d+))?$")
_DROPPED = re.compile(rf"{_PREFIX}(?:\d+|{_CLOSED})-(\d+)-")

RESERVE = 4
"""An answer without a limit of its own has at least a context's share of this many positions."""


class Gap(NamedTuple):
    """Positions of an item that its dropped tokens keep free."""

    full: int
    """As many as were dropped."""
    allowed: int
    """As many as are left where the prompt is long."""


class Fit(NamedTuple):
    """What fits into a rotary table."""

    gap: int
    """Positions that dropped tokens may keep free, in all of the prompt."""
    answer: int
    """Tokens that may be generated."""


def allowed_gap(tokens: int, gap: int, answer: int, context: int, table: int) -> Fit:
    """Return how many positions may stay free, and how long the answer may become.

    An answer that may fill the context (none was asked to be shorter) does not shorten the gaps
    by all of that: it gets what positions are left, as without pruning, and at least a quarter of
    the context.

    Args:
        tokens: of the pruned prompt.
        gap: dropped tokens, of all of its items.
        answer: tokens that the request allows to be generated.
        context: ``max_model_len``.
        table: positions that the model has.

    Returns:
        ``tokens + gap + answer <= table``, unless no gap is left at all.

    """
    is_open = tokens + answer >= context
    needed = min(answer, max(1, context // RESERVE)) if is_open else answer
    allowed = max(0, min(gap, table - tokens - needed))
    return Fit(allowed, min(answer, table - tokens - allowed) if allowed else answer)


def dealt_out(gaps: Sequence[int], allowed: int) -> list[int]:
    """Share the allowed positions over items, in proportion to what each dropped."""
    total = sum(gaps)
    if not total:
        return [0] * len(gaps)
    shares, passed = [], 0
    for gap in gaps:
        before = passed * allowed // total
        passed += gap
        shares.append(passed * allowed // total - before)
    return shares


def item_name(identity: bytes, gap: int | None, dropped: int) -> str:
    """Return what vLLM's caches know a pruned item by.

    Args:
        identity: 32 bytes, of the item and what is asked of it.
        gap: positions that its dropped tokens keep free; ``None`` where places close up.
        dropped: tokens that it loses. With one axis as many as ``gap``, where that is a number.

    """
    return f"{_PREFIX}{_CLOSED if gap is None else gap}-{dropped}-{identity.hex()}"


def dropped_tokens(name: str) -> int:
    """Read off an item's name how many of its tokens the encoder makes and no one keeps."""
    found = _DROPPED.search(name)
    return 0 if found is None else int(found[1])


def shortened_name(name: str, allowed: int) -> str:
    """Return what vLLM's caches know an item by whose gap is shortened."""
    return f"{name}~{allowed}"


def is_pruned_name(name: str) -> bool:
    """Return whether an item is pruned, by its name in vLLM's caches."""
    return name.startswith(_PREFIX)


def is_closed_name(name: str) -> bool:
    """Return whether an item is pruned and its places close up, by its name."""
    # With an adapter vLLM puts its name in front.
    return f"{_PREFIX}{_CLOSED}-" in name


def gap_of(name: str) -> Gap | None:
    """Read an item's gap off its name; ``None`` where it keeps no places.

    Args:
        name: an item's identity in vLLM's caches, with whatever vLLM puts in front.

    """
    found = _NAME.search(name)
    if found is None:
        return None
    full = int(found[1])
    return Gap(full, full if found[2] is None else int(found[2]))
