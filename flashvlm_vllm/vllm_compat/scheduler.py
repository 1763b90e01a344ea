# SPDX-License-Identifier: Apache-2.0
"""Limits the vision encoder's work in one step by the tokens it computes, not by those kept.

vLLM's scheduler admits items to a step until their embeddings reach the encoder budget. A pruned
item has few embeddings, whatever its size, so a step could encode hundreds of images and delay the
requests that decode in the same step. Here dropped tokens of an item count too, so that it counts
as much as without pruning.
"""

from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from flashvlm_vllm.ipc.gaps import dropped_tokens
from flashvlm_vllm.supported_models import classes
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
    """Admit as many of a request's items to a step as without pruning.

    Args:
        original: vLLM's method.
        scheduler: vLLM's scheduler.
        request: the request to schedule.
        computed: number of its tokens that were computed before.
        new: number of its tokens to compute in this step.
        budget: encoder tokens left for this step.
        args: passed to the original.
        kwargs: passed to the original.

    Returns:
        The result of the original; the remaining budget, its third entry, is reduced by the dropped
        tokens of the admitted items.

    """
    items = request.mm_features
    is_done = not items or not new or _end(items[-1]) <= computed
    # Items of other models are never pruned, whatever their names are.
    if is_done or not _is_covered(scheduler.vllm_config.model_config.architecture):
        return original(scheduler, request, computed, new, budget, *args, **kwargs)
    shift = kwargs.get("shift_computed_tokens", args[0] if args else 0)
    allowed = _tokens_that_fit(scheduler, items, computed + shift, new, budget)
    result = original(scheduler, request, computed, allowed, budget, *args, **kwargs)
    dropped = sum(dropped_tokens(items[number].identifier) for number in result[0])
    return result if not dropped else (*result[:2], result[2] - dropped, *result[3:])


@cache
def _is_covered(architecture: str) -> bool:
    return architecture in classes()


def _end(item: Any) -> int:
    return int(item.mm_position.offset + item.mm_position.length)


def _tokens_that_fit(scheduler: Any, items: Any, computed: int, new: int, budget: int) -> int:
    """Return the number of tokens that can be scheduled before an item that does not fit.

    The first item of a step always fits: vLLM's budget is at least the size of the largest item.
    """
    is_first = budget >= scheduler.max_num_encoder_input_tokens
    cached = scheduler.encoder_cache_manager.cached
    seen: set[str] = set()
    # vLLM sorts items by offset, so their ends are ascending; computed items are skipped.
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
        "It limits the encoder's work in a step by the number of kept embeddings, so a step could "
        "encode hundreds of pruned images.",
        "0.32",
        "An item states the cost of encoding it.",
        "https://github.com/vllm-project/vllm/pull/30475",
        wrapper=schedule_whole_items,
    ),
)
