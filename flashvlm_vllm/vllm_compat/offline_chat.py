# SPDX-License-Identifier: Apache-2.0
"""Wraps ``LLM.chat``: passes the settings in content parts to the multimodal processor."""

from typing import Any, Final

from flashvlm_vllm.request.field_error import FieldError
from flashvlm_vllm.request.parts import ITEMS, item_settings
from flashvlm_vllm.vllm_compat.wrap import Wrap


def _preprocess_chat_one(
    original: Any,
    llm: Any,
    conversation: Any,
    *args: Any,
    mm_processor_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    try:
        items = item_settings(conversation)
    except FieldError as error:
        from flashvlm_vllm.request.refusal import refusal_of

        raise refusal_of(error) from None
    if items:
        mm_processor_kwargs = {**(mm_processor_kwargs or {}), ITEMS: items}
    return original(llm, conversation, *args, mm_processor_kwargs=mm_processor_kwargs, **kwargs)


WRAPS: Final = (
    Wrap(
        "vllm.entrypoints.llm:LLM._preprocess_chat_one",
        "LLM.chat drops what content parts have beside an image or a video.",
        "0.32",
        "Content parts carry settings of a plugin to the processor.",
        wrapper=_preprocess_chat_one,
        # LLM imports it; servers and workers do not need it.
        only_if_imported=True,
    ),
)
