# SPDX-License-Identifier: Apache-2.0
"""Fits the gaps of a prompt into the model's positions, once its longest answer is known.

That is where vLLM makes a request for the engine of a processed prompt and sampling parameters,
on every endpoint and offline. What is allowed goes into the names that vLLM's caches know the
pruned items by; the worker reads it there.
"""

from dataclasses import replace
from typing import Any

from flashvlm_vllm.ipc.gaps import allowed_gap, dealt_out, gap_of, shortened_name
from flashvlm_vllm.ipc.prompt_report import LAYOUT
from flashvlm_vllm.position_scheme import table_length


def fit(request: Any, model_config: Any, prompt: Any) -> None:
    """Shorten the gaps of a request's items where prompt and answer would pass the table's end.

    Args:
        request: vLLM's ``EngineCoreRequest``; changed.
        model_config: the engine's.
        prompt: the processed prompt that it was made of.

    """
    features = request.mm_features or ()
    gaps = [gap_of(each.identifier) for each in features]
    full = [0 if gap is None else gap.full for gap in gaps]
    if not any(full):
        return
    tokens, sampling = len(request.prompt_token_ids), request.sampling_params
    answer = 1 if sampling is None else sampling.max_tokens
    context, table = model_config.max_model_len, table_length(model_config)
    allowed = allowed_gap(tokens, sum(full), answer, context, table)
    if sampling is not None:
        sampling.max_tokens = allowed.answer
        sampling.min_tokens = min(sampling.min_tokens, allowed.answer)
    if allowed.gap == sum(full):
        return
    shares = dealt_out(full, allowed.gap)
    request.mm_features = [
        each if gap is None else replace(each, identifier=shortened_name(each.identifier, share))
        for each, gap, share in zip(features, gaps, shares, strict=True)
    ]
    if isinstance(prompt, dict) and LAYOUT in prompt:
        prompt[LAYOUT].shorten()
