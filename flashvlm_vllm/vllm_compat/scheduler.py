# SPDX-License-Identifier: Apache-2.0
"""Bounds what the vision encoder does in one step by what it computes, not by what stays of it.

vLLM's scheduler admits items to a step until their embeddings come to a budget. A pruned item has
few, whatever its size, so a step could encode hundreds of images, and requests that decode in the
same step would wait. Here every item counts with its dropped tokens, as it does without pruning.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Final

from flashvlm_vllm.ipc.gaps import dropped_tokens
from flashvlm_vllm.vllm_compat.wrap import Wrap


def schedule_whole_items(
    original: Callable[..., Any],
    scheduler: Any,
    request: Any,
    computed: int,
    new: int,
    budget: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Admit as many of a request's items to a step as whole ones would be.

    Args:
        original: the scheduler's own method.
        scheduler: vLLM's.
        request: whose tokens are about to be scheduled.
        computed: tokens of it that were computed before.
        new: tokens of it that would be computed in this step.
        budget: encoder tokens that are left to this step.
        args: passed on.
        kwargs: passed on.

    Returns:
        what the original returns; the third entry, the budget that is left, is less by the tokens
        that the admitted items drop.

    """
    items = request.mm_features
    if not items or not new or _end(items[-1]) <= computed:
        return original(scheduler, request, computed, new, budget, *args, **kwargs)
    shift = kwargs.get("shift_computed_tokens", args[0] if args else 0)
    allowed = _tokens_that_fit(scheduler, items, computed + shift, new, budget)
    result = original(scheduler, request, computed, allowed, budget, *args, **kwargs)
    dropped = sum(dropped_tokens(items[number].identifier) for number in result[0])
    return result if not dropped else (*result[:2], result[2] - dropped, *result[3:])


def _end(item: Any) -> int:
    return int(item.mm_position.offset + item.mm_position.length)


def _tokens_that_fit(scheduler: Any, items: Any, computed: int, new: int, budget: int) -> int:
    """Return how many tokens can be scheduled before an item that does not fit any more.

    One item always fits into a step that has none yet: vLLM makes its budget that large.
    """
    is_first = budget >= scheduler.max_num_encoder_input_tokens
    cached = scheduler.encoder_cache_manager.cached
    seen: set[str] = set()
    # Ends ascend, as vLLM sorts items. Those that are computed are not looked at in every step.
    for item in items[bisect_right(items, computed, key=_end) :]:
        if item.mm_position.offset >= computed + new:
            break
        name = item.identifier
        if name in cached or name in seen:
            continue
        seen.add(name)
        budget -= item.mm_position.get_num_embeds() + dropped_tokens(name)
        if budget < 0 and not is_first:
            return max(0, int(item.mm_position.offset) - computed)
        is_first = False
    return new


WRAPS: Final = (
    Wrap(
        "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
        "It limits the encoder's work in a step by the embeddings that stay, so a step could "
        "encode hundreds of pruned images.",
        "0.32",
        "An item says what its encoding costs.",
        "https://github.com/vllm-project/vllm/pull/30475",
        wrapper=schedule_whole_items,
    ),
)
