# SPDX-License-Identifier: Apache-2.0
"""Gaps: the positions that dropped tokens leave unused, and how gaps are shortened.

If kept tokens keep their positions, a pruned prompt of ``n`` tokens from which ``gap`` tokens were
dropped ends at position ``n + gap``, and generated tokens continue from there. The model's rotary
table limits positions. If prompt and answer fit into the table, gaps are left unchanged; otherwise
all gaps are shortened in proportion:

    position = index in the pruned prompt + floor(dropped before it * allowed / gap)

The order of tokens does not change, adjacent tokens remain adjacent, and with ``allowed = 0``
positions are consecutive. ``allowed`` depends only on the arguments of `allowed_gap` and is part
of the identity of every pruned item, so the prefix cache never mixes KV blocks of two layouts.

Pure functions, used by the API process and the worker.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_PREFIX = "flashvlm-"
_CLOSED = "closed"
_NAME = re.compile(rf"{_PREFIX}(\d+)-\d+-[0-9a-f]{{64}}[^~]*(?:~(\d+))?$")
_DROPPED = re.compile(rf"{_PREFIX}(?:\d+|{_CLOSED})-(\d+)-")

RESERVE = 4
"""An answer without a limit (``max_tokens``) gets at least 1 / ``RESERVE`` of the context."""


class Gap(NamedTuple):
    """Number of positions that an item's dropped tokens leave unused."""

    full: int
    """Without shortening: as many as tokens were dropped."""
    allowed: int
    """After shortening; equal to ``full`` if the prompt fits."""


class Fit(NamedTuple):
    """Gaps and answer that fit into a rotary table."""

    gap: int
    """Total number of unused positions allowed in the prompt."""
    answer: int
    """Most tokens to generate."""


def allowed_gap(tokens: int, gap: int, answer: int, context: int, table: int) -> Fit:
    """Return the number of positions that may stay unused, and the longest possible answer.

    If the request does not limit its answer, the answer may fill the context. Gaps are then not
    shortened for all of it: the answer gets the positions that are left, and at least a quarter of
    the context.

    Args:
        tokens: number of tokens in the pruned prompt.
        gap: number of dropped tokens of all its items.
        answer: most tokens to generate, as requested.
        context: ``max_model_len``.
        table: number of positions in the rotary table.

    Returns:
        A `Fit` with ``tokens + gap + answer <= table``, unless its gap is 0.

    """
    is_open = tokens + answer >= context
    needed = min(answer, max(1, context // RESERVE)) if is_open else answer
    allowed = max(0, min(gap, table - tokens - needed))
    return Fit(allowed, min(answer, table - tokens - allowed) if allowed else answer)


def dealt_out(gaps: Sequence[int], allowed: int) -> list[int]:
    """Divide the allowed positions over items, in proportion to their dropped tokens."""
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
    """Return the identity of a pruned item in vLLM's caches.

    Args:
        identity: 32 bytes, see `processing.identity.selection_key`.
        gap: positions that its dropped tokens leave unused; ``None`` if positions are consecutive.
        dropped: number of dropped tokens; equal to ``gap`` with one axis, if that is not ``None``.

    """
    return f"{_PREFIX}{_CLOSED if gap is None else gap}-{dropped}-{identity.hex()}"


def dropped_tokens(name: str) -> int:
    """Return the number of an item's tokens that are encoded and then dropped, from its name."""
    found = _DROPPED.match(_own(name))
    return 0 if found is None else int(found[1])


def shortened_name(name: str, allowed: int) -> str:
    """Return the identity in vLLM's caches of an item whose gap is shortened to ``allowed``."""
    return f"{name}~{allowed}"


def may_be_mistaken(uuid: str) -> bool:
    """Return whether a client's uuid could be taken for the name of a pruned item."""
    return _PREFIX in uuid


def is_pruned_name(name: str) -> bool:
    """Return whether an item is pruned, by its name in vLLM's caches."""
    return _DROPPED.match(_own(name)) is not None


def is_closed_name(name: str) -> bool:
    """Return whether an item is pruned and has consecutive positions, by its name."""
    return _own(name).startswith(f"{_PREFIX}{_CLOSED}-")


def gap_of(name: str) -> Gap | None:
    """Return an item's gap, from its name; ``None`` if its positions are consecutive.

    Args:
        name: an item's identity in vLLM's caches, including any prefix that vLLM adds.

    """
    found = _NAME.match(_own(name))
    if found is None:
        return None
    full = int(found[1])
    return Gap(full, full if found[2] is None else int(found[2]))


def _own(name: str) -> str:
    """Return an item's name without that of a LoRA adapter, which vLLM may put before it."""
    return name.rpartition(":")[2]
