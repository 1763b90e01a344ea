# SPDX-License-Identifier: Apache-2.0
"""Fits the gaps of a prompt into the model's positions, once its longest answer is known.

That is where vLLM makes a request for the engine of a processed prompt and sampling parameters,
on every endpoint and offline. What is allowed goes into the names that vLLM's caches know the
pruned items by; the worker reads it there.
"""

from dataclasses import replace
from typing import Any

from flashvlm_vllm.gaps import allowed_gap, dealt_out, gap_of, shortened_name
from flashvlm_vllm.visual_report import LAYOUT

_LENGTHS = ("max_position_embeddings", "seq_length", "max_sequence_length")
"""What language models call the number of positions in their configurations, and vLLM takes for
their rotary tables."""


def table_length(model_config: Any) -> int:
    """Return how many positions a model's rotary table certainly has.

    Scaled embeddings have a longer table than the configuration says, at least ``max_model_len``.
    """
    config = model_config.hf_text_config
    known = (getattr(config, name, None) for name in _LENGTHS)
    given = next((each for each in known if isinstance(each, int)), model_config.max_model_len)
    return max(given, model_config.max_model_len) if _is_scaled(config) else given


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
        each
        if gap is None
        else replace(each, identifier=shortened_name(each.identifier, share))
        for each, gap, share in zip(features, gaps, shares, strict=True)
    ]
    if isinstance(prompt, dict) and LAYOUT in prompt:
        prompt[LAYOUT].shorten()


def _is_scaled(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = rope.values() if any(isinstance(value, dict) for value in rope.values()) else [rope]
    kinds = {own.get("rope_type", own.get("type", "default")) for own in each if own}
    return bool(kinds) and "default" not in kinds
