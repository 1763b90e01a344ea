# SPDX-License-Identifier: Apache-2.0
"""Wraps vLLM's renderer: passes a chat request's visual fields to the multimodal processor."""

import copy
from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


async def _preprocess_chat(
    original: Any, renderer: Any, request: Any, messages: Any, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.processing.validation import check_selectors
    from flashvlm_vllm.serving.rendering import render_with_budget

    trusting = copy.copy(renderer)
    trusting.trust_request_mm_kwargs = True
    return await render_with_budget(
        original, renderer, trusting, check_selectors, request, messages, *args, **kwargs
    )


WRAPS: Final = (
    Wrap(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        "All chat endpoints convert a request to a prompt here. There is no other way to pass a "
        "plugin's request fields to the processor: by default vLLM refuses mm_processor_kwargs "
        "of clients.",
        "0.32",
        "vLLM has a hook to pass request fields to the processor.",
        "https://github.com/vllm-project/vllm/issues/29277",
        wrapper=_preprocess_chat,
    ),
)
