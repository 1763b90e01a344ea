# SPDX-License-Identifier: Apache-2.0
"""Renderer: a chat request's visual fields reach the multimodal processor."""

import copy
from typing import Any, Final

from flashvlm_vllm.vllm_compat.wrap import Wrap


async def _preprocess_chat(
    original: Any, renderer: Any, request: Any, messages: Any, *args: Any, **kwargs: Any
) -> Any:
    from flashvlm_vllm.processing.validation import check_selector
    from flashvlm_vllm.serving.rendering import render_with_budget

    trusting = copy.copy(renderer)
    trusting.trust_request_mm_kwargs = True
    return await render_with_budget(
        original, renderer, trusting, check_selector, request, messages, *args, **kwargs
    )


WRAPS: Final = (
    Wrap(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        "Every chat-like endpoint turns a request into a prompt here. Request fields of a plugin "
        "have no other way to the processor: mm_processor_kwargs of clients are refused by "
        "default, rightly.",
        "0.32",
        "vLLM has a hook from the request to the processor.",
        "https://github.com/vllm-project/vllm/issues/29277",
        wrapper=_preprocess_chat,
    ),
)
