# SPDX-License-Identifier: Apache-2.0
"""Applies the wraps that an engine needs, and those that an API process needs."""

from flashvlm_vllm.vllm_compat import (
    chat_handlers,
    engine_config,
    input_processor,
    renderer,
    runners,
    scheduler,
    worker_methods,
)
from flashvlm_vllm.vllm_compat.wrap import Wrap, apply_all

ENGINE: tuple[Wrap, ...] = (
    *engine_config.WRAPS,
    *runners.WRAPS,
    *input_processor.WRAPS,
    *scheduler.WRAPS,
    *worker_methods.WRAPS,
)
SERVING: tuple[Wrap, ...] = (*renderer.WRAPS, *chat_handlers.WRAPS)


def to_engine() -> None:
    """Wrap what every engine needs, offline ones too. Idempotent."""
    apply_all(ENGINE)
    worker_methods.add_to_workers()


def to_serving() -> None:
    """Wrap what an API process needs. Idempotent."""
    apply_all(SERVING)
