# SPDX-License-Identifier: Apache-2.0
"""Runs the selectors: on rank 0, once per selection key; all ranks get the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from flashvlm_vllm.request.selector_name import SELECTOR
from flashvlm_vllm.selection import (
    Selection,
    Selector,
    SelectorError,
    VisualTokens,
    run_selector,
    run_selector_many,
    stand_in,
)
from flashvlm_vllm.selection.registry import BUILT_IN, find_selector
from flashvlm_vllm.worker.candidates import Candidates
from flashvlm_vllm.worker.feature_cache import selection_cache
from flashvlm_vllm.worker.selection_clock import SELECTION_CLOCK, Work
from flashvlm_vllm.worker.selector_failures import SELECTOR_FAILURES
from flashvlm_vllm.worker.video_budget import choose_of_clip

logger = init_logger("vllm.flashvlm")  # vLLM configures only its own loggers


class Chooser:
    """Selects tokens in one worker, and caches the selections."""

    def __init__(self) -> None:
        self._selections = selection_cache()

    def select(self, candidates: Sequence[Candidates]) -> list[Selection]:
        """Select on rank 0; return the same tokens on every rank and in every later call.

        If two nearly equal scores swap their order, Algorithm 1 compares other pairs in all later
        rounds. Ranks that select on their own from almost equal inputs could keep different tokens.
        So could an image that is encoded again, in another batch, for the rest of a request whose
        first blocks are in the prefix cache.

        Returns:
            ``min(budget, N)`` tokens per candidate. If a selector of another package failed, these
            are evenly spaced tokens, and the failure is recorded.

        """
        group = get_tp_group()
        if group.world_size == 1:
            return self._select_here(candidates)
        chosen = self._select_here(candidates) if group.rank_in_group == 0 else None
        filled: list[dict[str, Tensor]] = [{} for _ in candidates]
        for kind in ("indices", "merged", "anchors"):
            rows = [row for row, each in enumerate(candidates) if kind in each.kinds]
            if not rows:
                continue
            like = candidates[rows[0]].part.features[:0]
            if kind != "merged":
                like = like.new_empty(0, dtype=torch.int64)
            counts = [candidates[row].kept for row in rows]
            if chosen is None:
                sent = like.new_empty(sum(counts), *like.shape[1:])
            else:
                sent = torch.cat([getattr(chosen[row], kind) for row in rows])
            parts = group.broadcast(sent, src=0).split(counts)
            for row, part in zip(rows, parts, strict=True):
                filled[row][kind] = part
        return [Selection(**fields) for fields in filled]

    def clear(self) -> None:
        """Remove all selections."""
        self._selections.clear()

    def _select_here(self, candidates: Sequence[Candidates]) -> list[Selection]:
        selections: dict[tuple[bytes, int], Selection] = {}
        new: dict[tuple[bytes, int], Candidates] = {}
        for each in candidates:
            cached = self._selections.get(each.key)
            if cached is None:
                new[each.key] = each
            else:
                selections[each.key] = cached
        if new:
            selections |= dict(zip(new, choose(list(new.values())), strict=True))
            for key in new:
                self._selections.put(key, selections[key].detached())
        return [selections[each.key] for each in candidates]


def choose(candidates: Sequence[Candidates]) -> list[Selection]:
    """Select from all candidates; those with the same selector are selected together."""
    chosen: dict[int, Selection] = {}
    asked: dict[str, list[int]] = {}
    for row, each in enumerate(candidates):
        if each.budget >= each.total:
            indices = torch.arange(each.total, device=each.part.projected.device)
            chosen[row] = Selection(indices=indices)
        else:
            asked.setdefault(each.selector, []).append(row)
    for name, rows in asked.items():
        own = [candidates[row] for row in rows]
        work = Work(name, len(own), max(each.total for each in own))
        with SELECTION_CLOCK.measure(own[0].part.projected.device, work):
            selections = _choose_with(name, own)
        chosen |= dict(zip(rows, selections, strict=True))
    return [chosen[row] for row in range(len(candidates))]


def _choose_with(name: str, candidates: Sequence[Candidates]) -> list[Selection]:
    """Select with one selector: images together if it supports that, videos one by one."""
    selector = find_selector(name)
    chosen: dict[int, Selection] = {}
    images = [row for row, each in enumerate(candidates) if each.part.frames == 1]
    for row, each in enumerate(candidates):
        if each.part.frames > 1:

            def run(tokens: Sequence[VisualTokens], each: Candidates = each) -> list[Selection]:
                return _run(name, selector, tokens, [each.selection_key] * len(tokens))

            chosen[row] = choose_of_clip(each.tokens(selector), each.part.frames, selector, run)
    if images:
        tokens = [candidates[row].tokens(selector) for row in images]
        keys = [candidates[row].selection_key for row in images]
        chosen |= dict(zip(images, _run(name, selector, tokens, keys), strict=True))
    return [chosen[row] for row in range(len(candidates))]


def _run(
    name: str, selector: Selector, tokens: Sequence[VisualTokens], selection_keys: Sequence[bytes]
) -> list[Selection]:
    trusted = name in BUILT_IN
    try:
        return run_selector_many(name, selector, tokens, trusted=trusted)
    except SelectorError:
        # Find out which item failed; the requests of the other items must not fail.
        selections = []
        for own, key in zip(tokens, selection_keys, strict=True):
            try:
                selections.append(run_selector(name, selector, own, trusted=trusted))
            except SelectorError as error:
                SELECTOR_FAILURES.add(key.hex(), f"{SELECTOR}: {error}")
                logger.error("flashvlm: selector %s; its request fails", error)
                selections.append(stand_in(selector, own))
        return selections
