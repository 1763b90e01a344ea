# SPDX-License-Identifier: Apache-2.0
"""Applies the wraps needed in an engine, and those needed in an API process."""

from flashvlm_vllm.vllm_compat import (
    chat_handlers,
    encoder_graphs,
    engine_config,
    input_processor,
    messages,
    offline_chat,
    renderer,
    runners,
    scheduler,
    statistics,
    worker_methods,
)
from flashvlm_vllm.vllm_compat.wrap import Wrap, apply_all

ENGINE: tuple[Wrap, ...] = (
    *engine_config.WRAPS,
    *runners.WRAPS,
    *encoder_graphs.WRAPS,
    *input_processor.WRAPS,
    *offline_chat.WRAPS,
    *scheduler.WRAPS,
    *worker_methods.WRAPS,
)
SERVING: tuple[Wrap, ...] = (
    *renderer.WRAPS,
    *chat_handlers.WRAPS,
    *messages.WRAPS,
    *statistics.WRAPS,
)


def to_engine() -> None:
    """Apply the wraps of every engine, online or offline. Idempotent."""
    apply_all(ENGINE)
    worker_methods.add_to_workers()


def to_serving() -> None:
    """Apply the wraps of an API process. Idempotent."""
    apply_all(SERVING)
