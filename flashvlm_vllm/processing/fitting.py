# SPDX-License-Identifier: Apache-2.0
"""Shortens the gaps of a prompt so that prompt and answer fit into the rotary table.

This happens where vLLM creates an ``EngineCoreRequest`` from a processed prompt and sampling
parameters, on every endpoint and offline. The allowed gaps become part of the pruned items'
identities in vLLM's caches, from which the worker reads them.
"""

from dataclasses import replace
from typing import Any

from flashvlm_vllm.ipc.gaps import allowed_gap, dealt_out, gap_of, shortened_name
from flashvlm_vllm.ipc.prompt_report import LAYOUT
from flashvlm_vllm.position_scheme import table_length


def fit(request: Any, model_config: Any, prompt: Any) -> None:
    """Shorten the gaps of a request's items if prompt and answer would exceed the rotary table.

    Args:
        request: vLLM's ``EngineCoreRequest``, modified in place.
        model_config: the engine's ``ModelConfig``.
        prompt: the processed prompt of the request.

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
